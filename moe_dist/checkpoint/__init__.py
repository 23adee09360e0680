"""Sharded checkpoints that any parallel layout can load: file formats, the manifest, loading and background saving.

Also starting a stage from an earlier stage's checkpoint. Imports core, config and parallel.
"""
