"""Generation of images and texts with a causal model: prompts, sampling, decoding with a key-value cache. Imports core,
parallel, data and model.
"""
