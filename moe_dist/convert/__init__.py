"""Import and export of weights: Hugging Face folders, packaged models, upcycling of dense models. Imports core, config,
parallel, data, corpora, model and checkpoint.
"""
