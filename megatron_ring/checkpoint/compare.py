"""Two checkpoints side by side: the options, the parameters and the values in which they differ."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ring.checkpoint.statistics import difference, type_name
from megatron_ring.checkpoint.summary import Summary, differing
from megatron_ring.checkpoint.tensors import Shapes


@dataclass(frozen=True)
class Names:
    """Parameters by where they are: only in the first, only in the second, in both with two shapes or with one."""

    only_first: list[str]
    only_second: list[str]
    reshaped: list[str]
    common: list[str]

    @property
    def same(self) -> bool:
        """Whether both have the same parameters, shapes included."""
        return not (self.only_first or self.only_second or self.reshaped)


def sorted_out(a: Shapes, b: Shapes) -> Names:
    """The names of two models' parameters."""
    both = sorted(a.keys() & b.keys())
    return Names(
        only_first=sorted(a.keys() - b.keys()),
        only_second=sorted(b.keys() - a.keys()),
        reshaped=[name for name in both if a[name] != b[name]],
        common=[name for name in both if a[name] == b[name]],
    )


@dataclass(frozen=True)
class Comparison:
    """What is asked of two checkpoints: what is kept as ``kind`` of the parameters whose names fit ``pattern``."""

    a: Summary
    b: Summary
    kind: str
    pattern: str

    @property
    def settings(self) -> dict[str, tuple[Any, Any]]:
        """The options in which they differ, with the value of each."""
        return differing(self.a.config, self.b.config)

    def names(self) -> Names:
        """Which parameters are compared, and which cannot be. Raises CheckpointError where there is nothing to do."""
        self.a.check_kind(self.kind)
        self.b.check_kind(self.kind)
        of_a, of_b = self.a.shapes(self.pattern), self.b.shapes(self.pattern)
        self.a.check_found(of_a | of_b, self.pattern)
        return sorted_out(of_a, of_b)

    def rows(self, names: Names) -> Iterator[dict[str, Any]]:
        """Name and difference of what both have in one shape; one tensor of each is in memory at a time."""
        return map(self._row, names.common)

    def _row(self, name: str) -> dict[str, Any]:
        of_a, of_b = (one.tensors.read(name, self.kind) for one in (self.a, self.b))
        types = dict.fromkeys([type_name(of_a), type_name(of_b)])
        return {"name": name, "type": ", ".join(types)} | asdict(difference(of_a, of_b))
