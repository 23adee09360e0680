"""The terms of the training objective, one file per family, and their registry. Imports core and parallel."""
