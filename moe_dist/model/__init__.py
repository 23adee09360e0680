"""The decoder: attention over packed documents, blocks, mixture-of-depths, LoRA and the key-value cache. Imports core,
config and parallel. mcore.py is the only file that imports megatron.
"""
