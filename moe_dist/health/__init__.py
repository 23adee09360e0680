"""The health of a run: checks before training, detection of hangs and slow ranks, and the decision whether a scheduler
restarts a job. Imports core, config, parallel and metrics.
"""
