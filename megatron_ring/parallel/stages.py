"""Moved to ``grid.py``; removed once all imports follow."""

from megatron_ring.parallel.grid import layers_of_stage

__all__ = ["layers_of_stage"]
