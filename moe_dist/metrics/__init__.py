"""What a run measures and where it goes: keys, routing, FLOPs, sinks, progress, the run folder and reports. Imports
core, config and parallel.
"""
