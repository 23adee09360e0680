"""The health of a run: checks before training, detection of hangs and slow ranks, and restarting of failed jobs.

Imports core, config, parallel and metrics.
"""
