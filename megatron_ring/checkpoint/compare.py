"""Comparison of two checkpoints: the options, parameters and values in which they differ."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ring.checkpoint.statistics import difference, dtype_name
from megatron_ring.checkpoint.summary import Summary, differing_options
from megatron_ring.checkpoint.tensors import Shapes


@dataclass(frozen=True)
class ComparedNames:
    """Parameter names of two models: only in one of them, or in both with or without equal shapes.

    common: in both, with the same shape.
    """

    only_first: list[str]
    only_second: list[str]
    reshaped: list[str]
    common: list[str]

    @property
    def same(self) -> bool:
        """Whether both have the same parameters with the same shapes."""
        return not (self.only_first or self.only_second or self.reshaped)


def compare_names(a: Shapes, b: Shapes) -> ComparedNames:
    """Compare the parameter names and shapes of two models."""
    both = sorted(a.keys() & b.keys())
    return ComparedNames(
        only_first=sorted(a.keys() - b.keys()),
        only_second=sorted(b.keys() - a.keys()),
        reshaped=[name for name in both if a[name] != b[name]],
        common=[name for name in both if a[name] == b[name]],
    )


@dataclass(frozen=True)
class Comparison:
    """A comparison of two checkpoints.

    kind: which tensors of each parameter to compare (``tensors.KINDS``). pattern: shell pattern for
    the names of the parameters.
    """

    a: Summary
    b: Summary
    kind: str
    pattern: str

    @property
    def settings(self) -> dict[str, tuple[Any, Any]]:
        """The options in which the two configs differ, with both values of each."""
        return differing_options(self.a.config, self.b.config)

    def names(self) -> ComparedNames:
        """Return which parameters can be compared and which cannot.

        Raises CheckpointError if a checkpoint lacks ``kind`` or no name matches ``pattern``.
        """
        self.a.check_kind(self.kind)
        self.b.check_kind(self.kind)
        shapes_a = self.a.shapes(self.pattern)
        shapes_b = self.b.shapes(self.pattern)
        self.a.check_match(shapes_a | shapes_b, self.pattern)
        return compare_names(shapes_a, shapes_b)

    def rows(self, names: ComparedNames) -> Iterator[dict[str, Any]]:
        """Yield the name and the difference of each common parameter.

        One tensor of each checkpoint is in memory at a time.
        """
        return map(self._row, names.common)

    def _row(self, name: str) -> dict[str, Any]:
        values_a = self.a.tensors.read(name, self.kind)
        values_b = self.b.tensors.read(name, self.kind)
        dtypes = dict.fromkeys([dtype_name(values_a), dtype_name(values_b)])
        return {"name": name, "type": ", ".join(dtypes)} | asdict(difference(values_a, values_b))
