"""The terms of the objective, one file a family, and their registry. Imports core and parallel."""
