"""Generation of images and texts with a causal model: prompts, sampling, and decoding with a key-value cache.

This package imports only core, parallel, data and model.
"""
