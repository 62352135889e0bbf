"""Arithmetic on one device: attention over one hop's keys, norms, RoPE, activations. Kernels know no ranks."""
