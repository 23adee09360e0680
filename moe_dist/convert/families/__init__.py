"""One file for each family of Hugging Face models. Each file converts its family's config.json to a `model:` section
and back, and names its family's tensors. The rest of convert does not depend on the family. This folder
imports core, config, model and the tensor maps of convert.
"""
