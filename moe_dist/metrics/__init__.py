"""Metrics of a run and where they are written: their keys, routing metrics, FLOPs, sinks, progress lines, the run
folder and reports. Imports core, config and parallel.
"""
