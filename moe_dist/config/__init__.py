"""The recipe: a YAML file with base and overrides, read into one typed tree, and its prerequisites. Imports core."""
