"""Metrics of a run, and where they are written: metric keys, routing metrics, FLOPs, sinks, progress, reports.

Also the run folder, which holds all files of a run. Imports core, config and parallel.
"""
