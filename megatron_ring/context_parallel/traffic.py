"""Moved to ``hop_cost.py``; removed once all imports follow."""

from megatron_ring.context_parallel.hop_cost import backward_bytes, queries_are_lighter

__all__ = ["backward_bytes", "queries_are_lighter"]
