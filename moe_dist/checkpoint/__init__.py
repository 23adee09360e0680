"""Sharded checkpoints that any parallel layout can load: file formats, the manifest, loading, background saving.

Also the start of a stage from an earlier stage's checkpoint. Imports core, config and parallel.
"""
