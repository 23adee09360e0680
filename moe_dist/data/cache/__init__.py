"""Token shards on disk: each raw shard is tokenized once, and its tokens are memory-mapped afterwards. Imports core,
config, data/shards, data/tasks and data/tokenizers.
"""
