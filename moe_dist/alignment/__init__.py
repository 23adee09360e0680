"""Neighbours for RoMA: embedding questions, and searching for each question's nearest neighbours.

Imports core and data.
"""
