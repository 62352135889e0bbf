"""Import and export of Hugging Face transformers models: Llama, Mistral, Qwen 2, Qwen 3, GPT-2."""
