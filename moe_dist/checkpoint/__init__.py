"""Sharded checkpoints that do not depend on the layout: formats, the manifest, saving in the background, starting a
stage from another. Imports core, config and parallel.
"""
