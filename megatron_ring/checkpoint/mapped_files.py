"""The parts of a checkpoint as memory maps: a file is opened once for many boxes, and does not stay in memory for it.

What was read of a map counts as this process's memory until the map is closed. So all are closed now and then, and
mapped anew when they are asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_ring.untrusted import check_regular

CLOSED_AFTER = 2**27
"""Bytes read of all maps; 128 MiB."""


@dataclass
class MappedFiles:
    """Those in ``folder``, by name. read_bytes: since they were closed."""

    folder: Path
    opened: dict[str, Any] = field(default_factory=dict)
    read_bytes: int = 0

    def open(self, name: str) -> Any:
        """What safetensors reads a file with. Raises UntrustedInputError where it is not a regular file."""
        if name not in self.opened:
            check_regular(self.folder / name)
            self.opened[name] = safe_open(self.folder / name, framework="pt")
        return self.opened[name]

    def count(self, read_bytes: int) -> None:
        """After this many more bytes were copied to where they are kept. What is still in use stays mapped."""
        self.read_bytes += read_bytes
        if self.read_bytes >= CLOSED_AFTER:
            self.opened.clear()
            self.read_bytes = 0
