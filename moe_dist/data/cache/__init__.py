"""Tokens on disk: what tokenizing each shard once leaves behind."""
