"""Ranks and their communication: rank discovery, the parallel layout, differentiable collectives, agreement on errors,
stop signals, aligned garbage collection, and a check that each rank has its own GPU. Imports core.
"""
