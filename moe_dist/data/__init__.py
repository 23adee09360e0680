"""From shards to batches, in five rooms: tokenizers, shards (raw tars in), cache (tokens on disk), stream (batches out)
and tasks (instructions, multiple choice). Imports core and config.
"""
