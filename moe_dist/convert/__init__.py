"""Import and export of weights: Hugging Face folders, packaged models, and sparse upcycling. Imports core, config,
parallel, data, corpora, model and checkpoint.
"""
