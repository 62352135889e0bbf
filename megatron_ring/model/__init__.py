"""One GPT, Llama-like or GPT-2-like by config. It is given an attention object and positions, and knows no ranks."""
