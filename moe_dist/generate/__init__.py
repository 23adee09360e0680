"""Pictures and texts from a causal model: prompts, sampling, decoding with a cache. Imports core, parallel, data and
model.
"""
