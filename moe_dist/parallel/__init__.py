"""Ranks: who they are (discovery), how they are grouped (layout), collectives with gradients, agreement on errors and
signals, and one GPU for each. Imports core.
"""
