"""Neighbours for RoMA: embedding of questions, and search for each question's nearest neighbours.

Imports core and data.
"""
