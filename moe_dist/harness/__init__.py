"""Tasks of EleutherAI's lm-evaluation-harness (the package lm_eval, extra `eval`), run over all ranks. Imports core,
config, parallel, data, model, evaluate and generate.

Rank 0 runs the harness: it reads the tasks, builds the requests and computes the metrics. All ranks compute the
answers to the requests.
"""
