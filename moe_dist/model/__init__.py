"""The decoder: attention over packed documents, blocks, mixture-of-depths, LoRA and the key-value cache. Imports core,
config and parallel. Only mcore.py imports megatron.
"""
