"""Evaluation of trained models: held-out losses, reference losses, caption gain, multiple choice, confidence intervals.

Imports core, config, parallel, data and losses.
"""
