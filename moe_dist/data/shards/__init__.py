"""Raw WebDataset tars: finding, checking, reading and writing them, and decoding their samples. Imports core and
data/tasks.
"""
