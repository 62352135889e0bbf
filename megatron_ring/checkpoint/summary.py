"""Summary of a checkpoint: its state, config and files, and statistics of selected tensors."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint import boxes, store
from megatron_ring.checkpoint.locate import described
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.statistics import dtype_name, statistics
from megatron_ring.checkpoint.tensors import Shapes, Tensors
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Summary:
    """A checkpoint without the values of its tensors.

    files: size of each in bytes. other_files: files in its folder that are not part of it.
    """

    path: Path
    state: RunState
    config: Config
    files: dict[str, int]
    tensors: Tensors
    other_files: list[str]

    @staticmethod
    def of(path: Path) -> "Summary":
        """Read the summary of the checkpoint at ``path`` without verifying its bytes.

        Raises CheckpointError.
        """
        state, files = described(path)
        others = store.foreign_files(path, files)
        sizes = {name: record.bytes for name, record in files.items()}
        sizes[store.STATE] = (path / store.STATE).stat().st_size
        return Summary(path, state, store.read_config(path), sizes, Tensors.open(path), others)

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters; tied ones count once."""
        return sum(boxes.size(boxes.whole(shape)) for shape in self.tensors.shapes.values())

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on, over all ranks: samples times their length."""
        return self.state.consumed_samples * self.state.seq_length

    def check_kind(self, kind: str) -> None:
        """Raise CheckpointError if the checkpoint has no tensors of ``kind``."""
        if kind not in self.tensors.kinds:
            stored = ", ".join(self.tensors.kinds)
            raise CheckpointError(
                f"{self.path} has no {kind} of its parameters, only {stored}. Set --kind."
            )

    def shapes(self, pattern: str) -> Shapes:
        """Return the shapes of the parameters whose names match a shell pattern, sorted by name."""
        return {
            name: shape
            for name, shape in sorted(self.tensors.shapes.items())
            if fnmatchcase(name, pattern)
        }

    def names(self, kind: str, pattern: str) -> list[str]:
        """Return the names of the parameters that match ``pattern``.

        Raises CheckpointError if there are none, or no tensors of ``kind``.
        """
        self.check_kind(kind)
        matching = list(self.shapes(pattern))
        self.check_match(matching, pattern)
        return matching

    def check_match(self, names: Collection[str], pattern: str) -> None:
        """Raise CheckpointError if ``names``, those that match ``pattern``, is empty."""
        if not names:
            known = sorted(self.tensors.shapes)
            raise CheckpointError(
                f"no tensor of {self.path} has a name like {pattern!r}. There are {len(known)}, "
                f"from {known[0]} to {known[-1]}. Set --tensors."
            )

    def rows(self, names: Iterable[str], kind: str) -> Iterator[dict[str, Any]]:
        """Yield name, shape, dtype and statistics of the ``kind`` tensor of each parameter.

        One tensor is in memory at a time.
        """
        return (self._row(name, kind) for name in names)

    def _row(self, name: str, kind: str) -> dict[str, Any]:
        tensor = self.tensors.read(name, kind)
        row = {"name": name, "shape": list(tensor.shape), "type": dtype_name(tensor)}
        return row | asdict(statistics(tensor))


def options(config: Config) -> dict[str, Any]:
    """Return every option of a config as ``section.key``."""
    flat = {}
    for name, section in asdict(config).items():
        if isinstance(section, dict):
            flat |= {f"{name}.{key}": value for key, value in section.items()}
    return flat


def differing_options(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Return the options in which two configs differ, with both values of each."""
    options_a = options(a)
    options_b = options(b)
    return {
        key: (value, options_b[key]) for key, value in options_a.items() if value != options_b[key]
    }
