"""Ranks and the communication between them: rank discovery, the parallel layout, collectives and agreement on errors.

Also stop signals, garbage collection at the same step on all ranks, and a check that each rank has its own GPU. Imports
core.
"""
