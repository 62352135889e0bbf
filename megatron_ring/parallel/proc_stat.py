"""Moved to ``process_id.py``; removed once all imports follow."""

from megatron_ring.parallel.process_id import ProcStat

__all__ = ["ProcStat"]
