"""Weights in and out: Hugging Face folders, packaged models, upcycling. Imports core, config, parallel, data, corpora,
model and checkpoint.
"""
