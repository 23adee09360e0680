"""Whether a run is well: checks before training, hangs, slow ranks, and what a scheduler should do with a job that
ended. Imports core, config, parallel and metrics.
"""
