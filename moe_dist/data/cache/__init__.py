"""Token shards on disk: each raw shard is tokenized once and memory-mapped afterwards. Imports core, config and
data/shards, data/tasks and data/tokenizers.
"""
