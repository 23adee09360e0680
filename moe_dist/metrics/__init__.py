"""Metrics of a run, and their output: metric keys, routing metrics, FLOPs, sinks, progress display, reports.

The run folder, which holds all files of a run, is also here. Imports core, config and parallel.
"""
