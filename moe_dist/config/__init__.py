"""Recipes: loading YAML files with bases and overrides into one typed tree, and finding a recipe's prerequisites.

This package imports only core.
"""
