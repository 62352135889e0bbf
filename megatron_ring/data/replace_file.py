"""Old import path of ``replace_file``, which is in megatron_ring/untrusted.py."""

from megatron_ring.untrusted import replace_file

__all__ = ["replace_file"]
