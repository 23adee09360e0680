"""Neighbours for RoMA: embeds questions and finds the nearest ones. Imports core and data."""
