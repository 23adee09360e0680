"""Batches from tokenised documents: packing, lanes, the training loader, held-out batches and RoMA's neighbour store.

Imports core, config, data/tasks and data/tokenizers.
"""
