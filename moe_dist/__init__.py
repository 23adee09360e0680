"""moe_dist: training of mixture-of-experts language models over expert-parallel ranks.

The rooms, from the ground floor up; each imports only rooms above it in this list (tests/test_imports.py): core,
config, parallel, data, corpora, model, losses, checkpoint, metrics, health, evaluate, generate, alignment, convert,
training.
"""
