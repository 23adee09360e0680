"""moe_dist: training of mixture-of-experts language models over expert-parallel ranks.

The packages, called rooms, in order: core, config, parallel, data, corpora, model, losses, checkpoint, metrics, health,
evaluate, generate, alignment, convert, training. Each imports only rooms earlier in this list; tests/test_imports.py
says which.
"""
