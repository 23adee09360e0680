"""One file for each family of Hugging Face models: its config.json as a `model:` section and back, and the names of its
tensors. No other file knows a family. Imports core, config, model and the tensor maps of convert.
"""
