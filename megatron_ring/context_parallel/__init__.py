"""Context parallelism: token ownership (layout), visibility (mask) and the ring loop (ring).

``attention.py`` has the module that the model calls.
"""
