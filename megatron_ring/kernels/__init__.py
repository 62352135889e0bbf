"""Computation on one device: attention of one hop, norms, RoPE, activations, the loss.

Kernels receive tensors and never a rank or a process group.
"""
