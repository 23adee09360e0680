"""Helpers of the tests. ROOT: the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
