"""Text and image tokenizers, their training, and the vocabulary that joins them. Imports core and data/shards."""
