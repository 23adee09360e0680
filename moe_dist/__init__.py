"""moe_dist: training of mixture-of-experts language models over expert-parallel ranks.

The packages are called rooms. In order, they are: core, config, parallel, data, corpora, model, losses, checkpoint,
metrics, health, evaluate, generate, alignment, convert, training. A room imports only rooms earlier in this list. The
imports that each room may have are listed in tests/test_imports.py.
"""
