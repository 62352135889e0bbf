"""Checkpoints of Hugging Face's transformers, in and out: Llama, Mistral, Qwen 2, Qwen 3 and GPT-2."""
