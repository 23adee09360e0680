"""Samples with a prompt and an answer: instructions and multiple-choice items. Imports core, config, data/shards and
data/tokenizers.
"""
