"""The recipe: one YAML file and overrides, read into one typed tree. Imports core."""
