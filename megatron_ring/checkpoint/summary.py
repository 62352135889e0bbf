"""What is in a checkpoint and how it was made: its state, its config, its files, and the tensors asked for, by name."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint import boxes, store
from megatron_ring.checkpoint.locate import described
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.statistics import statistics, type_name
from megatron_ring.checkpoint.tensors import Shapes, Tensors
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Summary:
    """A checkpoint without the values of its tensors.

    files: bytes of each. other_files: what is in its folder and no part of it.
    """

    path: Path
    state: RunState
    config: Config
    files: dict[str, int]
    tensors: Tensors
    other_files: list[str]

    @staticmethod
    def of(path: Path) -> "Summary":
        """Of the checkpoint at ``path``, whose bytes are not checked. Raises CheckpointError."""
        state, files = described(path)
        others = store.foreign_files(path, files)
        sizes = {name: record.bytes for name, record in files.items()}
        sizes[store.STATE] = (path / store.STATE).stat().st_size
        return Summary(path, state, store.read_config(path), sizes, Tensors.open(path), others)

    @property
    def parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(boxes.size(boxes.whole(shape)) for shape in self.tensors.shapes.values())

    @property
    def consumed_tokens(self) -> int:
        """Tokens seen, over all ranks: samples times their length."""
        return self.state.consumed_samples * self.state.seq_length

    def check_kind(self, kind: str) -> None:
        """Raise CheckpointError where nothing of ``kind`` is kept."""
        if kind not in self.tensors.kinds:
            kept = ", ".join(self.tensors.kinds)
            raise CheckpointError(
                f"{self.path} keeps no {kind} of its parameters, but {kept}. Set --kind."
            )

    def shapes(self, pattern: str) -> Shapes:
        """Those of the parameters whose names fit a shell pattern, in order."""
        return {
            name: shape
            for name, shape in sorted(self.tensors.shapes.items())
            if fnmatchcase(name, pattern)
        }

    def names(self, kind: str, pattern: str) -> list[str]:
        """The parameters whose names fit ``pattern``; CheckpointError where there are none, or nothing of ``kind``."""
        self.check_kind(kind)
        found = list(self.shapes(pattern))
        self.check_found(found, pattern)
        return found

    def check_found(self, names: Collection[str], pattern: str) -> None:
        """Raise CheckpointError where ``pattern`` has found no names."""
        if not names:
            known = sorted(self.tensors.shapes)
            raise CheckpointError(
                f"no tensor of {self.path} has a name like {pattern!r}. There are {len(known)}, from {known[0]} to "
                f"{known[-1]}. Set --tensors."
            )

    def rows(self, names: Iterable[str], kind: str) -> Iterator[dict[str, Any]]:
        """Name, shape, type and statistics of what is kept of each; one tensor is in memory at a time."""
        return (self._row(name, kind) for name in names)

    def _row(self, name: str, kind: str) -> dict[str, Any]:
        tensor = self.tensors.read(name, kind)
        what = {"name": name, "shape": list(tensor.shape), "type": type_name(tensor)}
        return what | asdict(statistics(tensor))


def settings(config: Config) -> dict[str, Any]:
    """Every option as ``section.key``."""
    sections = {name: value for name, value in asdict(config).items() if isinstance(value, dict)}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.items()
    }


def differing(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The options that two configs do not share, with the value of each."""
    of_a, of_b = settings(a), settings(b)
    return {key: (of_a[key], of_b[key]) for key in of_a if of_a[key] != of_b[key]}
