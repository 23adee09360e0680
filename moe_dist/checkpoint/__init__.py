"""Sharded checkpoints that any parallel layout can load: file formats, the manifest, loading and background saving.

This folder also loads the checkpoint of an earlier training stage into a new model. Imports core, config and parallel.
"""
