"""Deterministic kernels for a part of a program: torch's global setting, for as long as needed.

``torch.are_deterministic_algorithms_enabled()`` is what every kernel reads to choose between a fast
backward pass and one with a fixed order of additions: flash-attn's and the Triton kernel here, and
torch's own operators inside of torch. --deterministic turns it on for the whole program.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_users = 0
_previous = False, False


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Enable ``torch.use_deterministic_algorithms`` within the block, then restore the setting.

    The setting is that of the process, so blocks of several threads may overlap: the last one to
    end restores it.
    """
    global _users, _previous
    with _lock:
        if not _users:
            _previous = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            torch.use_deterministic_algorithms(True)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                enabled, warn_only = _previous
                torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
