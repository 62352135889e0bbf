"""Moved to ``consensus.py``; removed once all imports follow."""

from megatron_ring.parallel.consensus import abort_collectively, run_checked, run_checked_each_step

__all__ = ["abort_collectively", "run_checked", "run_checked_each_step"]
