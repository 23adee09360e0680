"""Samples with a prompt and an answer: instructions and multiple-choice items.

This package imports only core, config, data/shards and data/tokenizers.
"""
