"""The recipe: YAML, what it extends and overrides, read into one typed tree; what it needs first. Imports core."""
