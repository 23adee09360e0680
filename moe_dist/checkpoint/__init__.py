"""Sharded checkpoints that are independent of the parallel layout: file formats, the manifest, loading, saving in the
background, and starting a stage from another stage's checkpoint. Imports core, config and parallel.
"""
