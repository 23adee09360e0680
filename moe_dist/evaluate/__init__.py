"""Evaluation of trained models: held-out losses, reference losses, the value of captions, multiple choice, intervals.

Imports core, config, parallel, data and losses.
"""
