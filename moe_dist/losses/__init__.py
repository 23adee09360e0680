"""The terms of the training objective, one file per family, and their registry.

This package imports only core, config and parallel.
"""
