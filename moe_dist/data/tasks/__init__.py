"""Samples with a task: instructions and multiple-choice items."""
