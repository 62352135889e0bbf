"""Measure and draw how far attention in a ring is from attention in float64, over sizes of the ring.

python -m benchmarks.draw_precision --output docs/precision.md

One process computes the hops of all ranks, one after the other, in the order of the ring. Beside our state and sums in
float32 there is a ring as most are published: each hop's result is merged into an output of the inputs' type, and the
gradients that travel are of that type, too.

A second table compares one rank with the largest ring for each family of inputs, where the keys and
where the queries travel in the backward pass.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

from benchmarks.common import DTYPES
from benchmarks.emulated_ring import Attention, attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.errors import reporting_errors
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose, reference
from megatron_ring.model.attention import with_sink
from megatron_ring.settings.precision import device_type

_OPENING = """# An error that does not grow with the ring

Root mean square of the difference from float64 over that of the exact value. *ours*: the running output and the sums of
gradients are float32 from hop to hop, and rounded once at the end. *merged*: the same kernel in a ring that keeps them
in the inputs' type, as most published ones do.
""".splitlines()
_FAMILIES_OPENING = """
## Families of inputs

Relative error of the gradients on one rank and on {last} ranks, where the keys and where the
queries travel in the backward pass. With queries, delta travels in place of their output.
*growth*: the largest of the three errors on {last} ranks over that on {first}.

There are 2 query heads and 1 key-value head except in the rows that give other numbers.
*positive*: q, k and v are absolute values, so that all keys have a common part and an error of
delta shows in dq. *window*: of {window} tokens. *sinks*: a score of {sink:.1f} for each head.
{tokens} tokens; everything else as above.

Where one process attends in a single tile (up to 128 tokens, or a window that narrow), it rounds
each gradient once and a ring rounds each hop's share as well: there the error of dq on a ring is
up to 1.25 times that on one process, for rings of any size.
""".splitlines()
_COLOURS = {"ours": "#55a868", "merged": "#c44e52"}
_GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class InputFamily:
    """What kind of q, k, v and gradient of the output a ring is measured with.

    gradient: of the output: standard normal, 1, 1 / its size, or 1 in one element of each head.
    positive: q, k and v are absolute values of standard normal numbers.
    window: whether a query sees no further back than a quarter of the sequence.
    sinks: whether each head has an attention sink, whose gradient comes through the log-sum-exp.
    """

    gradient: Literal["random", "constant", "mean", "one-hot"] = "random"
    positive: bool = False
    heads: int = 2
    kv_heads: int = 1
    window: bool = False
    sinks: bool = False

    def inputs(
        self, tokens: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
    ) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output, (1, tokens, heads, head_dim); always the same."""
        generator = torch.Generator().manual_seed(1)
        each = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        drawn = [torch.randn(1, tokens, number, head_dim, generator=generator) for number in each]
        if self.positive:
            drawn[:3] = [x.abs() for x in drawn[:3]]
        return [x.to(device, dtype) for x in (*drawn[:3], self._gradient_like(drawn[3], generator))]

    def _gradient_like(self, drawn_BSHD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        match self.gradient:
            case "constant":
                return torch.ones_like(drawn_BSHD)
            case "mean":
                return torch.full_like(drawn_BSHD, 1 / drawn_BSHD.numel())
            case "one-hot":
                *rows, head_dim = drawn_BSHD.shape
                at_BSH = torch.randint(head_dim, rows, generator=generator)
                return torch.nn.functional.one_hot(at_BSH, head_dim)
            case _:
                return drawn_BSHD

    def mask(self, tokens: int) -> Mask:
        return Mask(_window(tokens)) if self.window else Mask()

    def then(self, tokens: int, device: str = "cpu") -> Callable[..., torch.Tensor] | None:
        """What follows attention, as ``emulated_ring.attention`` takes it: nothing, or the sinks."""
        if not self.sinks:
            return None
        sink_H = torch.full((self.heads,), _sink(tokens), device=device)
        return functools.partial(with_sink, sink_H=sink_H)

    def exact(
        self, tokens: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
    ) -> Attention:
        """The attention of these inputs, as rounded to ``dtype``, in float64."""
        inputs = [x.double() for x in self.inputs(tokens, head_dim, dtype, device)]
        layout, then = Layout("none", tokens, 1), self.then(tokens, device)
        return attention(inputs, layout, reference, self.mask(tokens), then=then)


FAMILIES = {
    "random": InputFamily(),
    "constant gradient": InputFamily("constant"),
    "mean gradient": InputFamily("mean"),
    "one-hot gradient": InputFamily("one-hot"),
    "positive": InputFamily(positive=True),
    "positive, constant gradient": InputFamily("constant", positive=True),
    "positive, mean gradient": InputFamily("mean", positive=True),
    "positive, one-hot gradient": InputFamily("one-hot", positive=True),
    "8 query heads, 1 key-value head": InputFamily(heads=8, kv_heads=1),
    "2 query heads, 2 key-value heads": InputFamily(heads=2, kv_heads=2),
    "window": InputFamily(window=True),
    "window, positive, constant gradient": InputFamily("constant", positive=True, window=True),
    "sinks": InputFamily(sinks=True),
    "sinks, positive, constant gradient": InputFamily("constant", positive=True, sinks=True),
}


def _window(tokens: int) -> int:
    return max(2, tokens // 4)


def _sink(tokens: int) -> float:
    """A score that outweighs few keys and that the keys of a long row outweigh."""
    return math.log(tokens) - 1


@dataclass(frozen=True)
class Merging:
    """A kernel whose results are merged, and whose sums are kept, in the type of its inputs."""

    kernel: HopKernel

    def forward(self, q_BLHD, k_BLGD, v_BLGD, runs, scale, state) -> None:
        self.kernel.forward(q_BLHD, k_BLGD, v_BLGD, runs, scale, state)
        _round(state.out_BLHD, q_BLHD.dtype)

    def backward(self, dout_BLHD, q_BLHD, *rest) -> None:
        self.kernel.backward(dout_BLHD, q_BLHD, *rest)
        for gradient in rest[-3:]:
            _round(gradient, q_BLHD.dtype)


def main(
    output: Path = Path("docs/precision.md"),
    seq_length: int = 4096,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    dtype: Literal["bf16", "fp16"] = "bf16",
    layout: Literal["ring", "striped", "zigzag"] = "striped",
    kernel: Literal["auto", "sdpa", "triton"] = "auto",
    ring_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    family_seq_length: int = 2048,
) -> None:
    """Write the table as Markdown and, beside it, the picture.

    Args:
        output: The page; the picture has its name and ends in .svg.
        seq_length: Tokens S of the one sequence.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Size of a head.
        dtype: Of q, k, v and the gradient of the output, which are standard normal.
        layout: Where tokens live.
        kernel: What computes a hop.
        ring_sizes: Ranks, emulated.
        family_seq_length: Tokens of the sequence of each family of inputs.
    """
    device = device_type()
    choice = choose(kernel, device, DTYPES[dtype], head_dim)
    random = InputFamily(heads=heads, kv_heads=kv_heads)
    inputs = random.inputs(seq_length, head_dim, DTYPES[dtype], device)
    exact = random.exact(seq_length, head_dim, DTYPES[dtype], device)
    layouts = [laid_out(layout, seq_length, size) for size in ring_sizes]
    kernels = {"ours": KERNELS[choice.name], "merged": Merging(KERNELS[choice.name])}
    errors = {
        name: [relative_errors(attention(inputs, one, used), exact) for one in layouts]
        for name, used in kernels.items()
    }
    size = f"{seq_length} tokens, {heads} query and {kv_heads} key-value heads of {head_dim}, {dtype}, causal"
    setting = f"{size}; layout {layout}, kernel {choice.name} on {device}, emulated ranks"
    ends = min(ring_sizes), max(ring_sizes)
    at_ends = [laid_out(layout, family_seq_length, size) for size in ends]
    kinds = {
        name: family_errors(family, at_ends, KERNELS[choice.name], head_dim, DTYPES[dtype], device)
        for name, family in FAMILIES.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    _draw(output.with_suffix(".svg"), ring_sizes, errors, kinds)
    page = _page(output.with_suffix(".svg").name, setting, ring_sizes, errors)
    output.write_text(page + _page_of_families(ends, family_seq_length, kinds))
    print(f"wrote {output}")


@dataclass(frozen=True)
class FamilyErrors:
    """Relative errors by the name of a tensor: on one rank, and on many with keys or queries sent."""

    alone: dict[str, float]
    keys: dict[str, float]
    queries: dict[str, float]

    def growth(self, gradient: str) -> float:
        return max(self.keys[gradient], self.queries[gradient]) / self.alone[gradient]

    @property
    def largest_growth(self) -> float:
        return max(map(self.growth, _GRADIENTS))


def family_errors(
    family: InputFamily,
    layouts: Sequence[Layout],
    kernel: HopKernel,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> FamilyErrors:
    """Errors of ``kernel`` in the first and in the second of two ``layouts`` of one length."""
    setting = layouts[0].seq_length, head_dim, dtype, device
    inputs, exact = family.inputs(*setting), family.exact(*setting)
    mask, then = family.mask(layouts[0].seq_length), family.then(layouts[0].seq_length, device)

    def errors(layout: Layout, queries_travel: bool) -> dict[str, float]:
        found = attention(inputs, layout, kernel, mask, queries_travel, then)
        return dict(zip(Attention._fields, relative_errors(found, exact)))

    small, large = layouts
    return FamilyErrors(errors(small, False), errors(large, False), errors(large, True))


def laid_out(layout: str, seq_length: int, ring_size: int) -> Layout:
    return Layout(layout if ring_size > 1 else "none", seq_length, ring_size)


def relative_errors(found: Attention, exact: Attention) -> list[float]:
    """Root mean square of the difference over that of the exact value, of each tensor."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact)]


def _round(x: torch.Tensor, dtype: torch.dtype) -> None:
    x.copy_(x.to(dtype))


def _draw(
    picture: Path,
    ring_sizes: Sequence[int],
    errors: dict[str, list[list[float]]],
    kinds: dict[str, FamilyErrors],
) -> None:
    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.8, 3.8))
    axes = above.subplots(1, len(Attention._fields), sharey=True)
    for number, (one, tensor) in enumerate(zip(axes, Attention._fields)):
        for name, rows in errors.items():
            one.plot(
                ring_sizes, [row[number] for row in rows], "o-", color=_COLOURS[name], label=name
            )
        one.set(xscale="log", xlabel="ranks of the ring", title=tensor, ylim=0)
        one.set_xticks(ring_sizes, [str(size) for size in ring_sizes])
        one.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[0].legend(frameon=False)
    _draw_families(below.subplots(), max(ring_sizes), kinds)
    plt.rcParams["svg.hashsalt"] = "precision"
    figure.savefig(picture, metadata={"Date": None})


def _draw_families(axes, ranks: int, kinds: dict[str, FamilyErrors]) -> None:
    rows = range(len(kinds))
    for gradient, marker in zip(_GRADIENTS, "os^"):
        growths = [kind.growth(gradient) for kind in kinds.values()]
        axes.plot(growths, rows, marker, color=_COLOURS["ours"], fillstyle="none", label=gradient)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(rows, kinds)
    axes.invert_yaxis()
    axes.set(xlabel=f"error on {ranks} ranks over that on one", xlim=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _page(
    picture: str, setting: str, ring_sizes: Sequence[int], errors: dict[str, list[list[float]]]
) -> str:
    last, first = (
        max(range(len(ring_sizes)), key=ring_sizes.__getitem__),
        ring_sizes.index(min(ring_sizes)),
    )
    growth = {
        name: max(rows[last][i] / rows[first][i] for i in range(4)) for name, rows in errors.items()
    }
    header = ["ranks", *(f"{tensor}, {name}" for tensor in Attention._fields for name in errors)]
    rows = [
        [str(size), *(f"{errors[name][i][number]:.5f}" for number in range(4) for name in errors)]
        for i, size in enumerate(ring_sizes)
    ]
    table = ["| " + " | ".join(row) + " |" for row in (header, ["---:"] * len(header), *rows)]
    grown = f"{growth['ours']:.2f} (ours) and {growth['merged']:.2f} (merged)"
    return "\n".join([
        *_OPENING,
        "",
        f"Written by `benchmarks/draw_precision.py`: {setting}.",
        "",
        f"![Relative error of output and gradients over ranks]({picture})",
        "",
        *table,
        "",
        f"From {min(ring_sizes)} to {max(ring_sizes)} ranks the worst of the four grows by a factor of {grown}.",
        "",
    ])  # fmt: skip


def _page_of_families(ends: tuple[int, int], tokens: int, kinds: dict[str, FamilyErrors]) -> str:
    first, last = ends
    columns = [f"{first}", f"{last}, keys", f"{last}, queries"]
    titles = [f"{name}, {column}" for name in _GRADIENTS for column in columns]
    header = ["inputs", *titles, "growth"]

    def row(kind: FamilyErrors) -> list[str]:
        figures = [x[name] for name in _GRADIENTS for x in (kind.alone, kind.keys, kind.queries)]
        return [*(f"{figure:.5f}" for figure in figures), f"{kind.largest_growth:.2f}"]

    rows = [[name, *row(kind)] for name, kind in kinds.items()]
    marks = ["---", *["---:"] * (len(header) - 1)]
    opening = "\n".join(_FAMILIES_OPENING)
    numbers = {"window": _window(tokens), "sink": _sink(tokens), "tokens": tokens}
    opening = opening.format(first=first, last=last, **numbers)
    worst = max(kind.largest_growth for kind in kinds.values())
    return "\n".join([
        opening,
        "",
        *("| " + " | ".join(row) + " |" for row in (header, marks, *rows)),
        "",
        f"The largest growth of a gradient's error is {worst:.2f}.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
