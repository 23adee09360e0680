"""Recipes: reading a YAML file with its bases and overrides into one typed tree, and finding its prerequisites.

Imports core.
"""
