"""Ranks and the communication between them: rank discovery, the parallel layout, collectives and agreement on errors.

This package also handles stop signals, collects garbage at the same step on all ranks, and checks that each rank has
its own GPU. It imports only core.
"""
