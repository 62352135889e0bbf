"""The GPT, configurable to be Llama-like or GPT-2-like.

The model receives an attention function and token positions; it does not depend on ranks or
layouts.
"""
