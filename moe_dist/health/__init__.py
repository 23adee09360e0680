"""The health of a run: checks before training, detection of hangs and slow ranks, and when to restart a job.

Imports core, config, parallel and metrics.
"""
