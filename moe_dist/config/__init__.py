"""The recipe: a YAML file with overrides, parsed into one typed tree. Imports core."""
