"""Evaluation of trained models: held-out losses with reference losses, the value of captions, multiple choice and
confidence intervals. Imports core, config, parallel, data and losses.
"""
