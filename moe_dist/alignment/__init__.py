"""Neighbours for RoMA: embedding of questions, and search for each question's nearest neighbours.

This package imports only core and data.
"""
