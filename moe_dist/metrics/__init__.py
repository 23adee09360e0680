"""Metrics of a run, and their output: metric keys, routing metrics, FLOPs, sinks, progress display, reports.

This room also manages the run folder, which holds all files of a run. Imports core, config and parallel.
"""
