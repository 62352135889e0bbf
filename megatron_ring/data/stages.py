"""Old import path of ``build_loader``, which is in loader.py."""

from megatron_ring.data.loader import LaterStageLoader
from megatron_ring.data.loader import build_loader as loader_of

__all__ = ["LaterStageLoader", "loader_of"]
