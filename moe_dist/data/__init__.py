"""Data, from raw shards to batches, in five packages: tokenizers, shards (raw tars), cache (tokens on disk), stream
(batches) and tasks (instructions, multiple choice). Imports core and config.
"""
