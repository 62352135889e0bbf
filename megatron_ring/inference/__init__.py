"""Inference on long contexts: a key-value cache that is sharded over a ring of ranks."""
