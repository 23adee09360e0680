"""Loading of recipes (YAML files with bases and overrides) into one typed tree, and search for their prerequisites.

This package imports only core.
"""
