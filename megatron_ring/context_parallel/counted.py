"""Moved to ``hop_cost.py``; removed once all imports follow."""

from megatron_ring.context_parallel.hop_cost import BACKWARD_PRODUCTS, FORWARD_PRODUCTS

__all__ = ["BACKWARD_PRODUCTS", "FORWARD_PRODUCTS"]
