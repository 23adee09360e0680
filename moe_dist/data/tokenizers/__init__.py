"""Text and image tokenizers, their training, and the vocabulary that joins them."""
