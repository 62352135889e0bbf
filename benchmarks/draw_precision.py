"""Measure and draw the error of ring attention relative to float64, by the size of the ring.

python -m benchmarks.draw_precision --output docs/precision.md

One process computes the hops of all ranks one after another, in the order of the ring. Our ring
keeps the running softmax and the gradient accumulators in float32 ("ours"). It is compared with a
ring like most published ones ("merged"): each hop's result is merged into an output of the inputs'
dtype, and the accumulators that travel have that dtype too.

Another table emulates flash-attn 4, whose calls return output and gradients in the inputs' dtype.
The last one compares one rank with the largest ring for several families of inputs, with keys and
with queries travelling in the backward pass.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from benchmarks.common import DTYPES, check_outputs, table_head, table_row
from benchmarks.emulated_ring import Attention, attention
from benchmarks.precision_errors import (
    FAMILIES,
    GRADIENTS,
    FamilyErrors,
    InputFamily,
    MergingKernel,
    RoundedHops,
    family_errors,
    layout_of,
    relative_errors,
    sink_score,
    window_size,
)
from megatron_ring.errors import reporting_errors
from megatron_ring.kernels.attention import KERNELS, choose, reference
from megatron_ring.settings.precision import device_type

_OPENING = """# An error that does not grow with the ring

Root mean square of the difference from float64 over that of the exact value. *ours*: the running
output and the gradient accumulators are float32 from hop to hop, and rounded once at the end.
*merged*: the same kernel in a ring that keeps them in the inputs' dtype, as most published ones do.
""".splitlines()
_FLASH_4_OPENING = """
## flash-attn 4, emulated

Each call of flash-attn returns the output and the gradients of its hop in the inputs' dtype. Our
ring merges and accumulates them in float32. Not measured with the library, which needs a GPU: each
hop was computed in float32 by the kernel reference, and its output, dq, dk and dv were rounded to
{dtype}. What the library rounds inside a call is not in these numbers. One rank has one hop, whose
results are rounded once. A ring rounds the results of each hop and then their sum. Everything else
is as above.
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
_COLORS = {"ours": "#55a868", "merged": "#c44e52"}


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
    """Write the tables as a Markdown page and the picture beside it.

    Args:
        output: The page; the picture has the same name with the suffix .svg.
        seq_length: Tokens of the sequence.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Head dim.
        dtype: Dtype of q, k, v and the gradient of the output, which are standard normal.
        layout: Layout of the tokens over the ranks.
        kernel: Kernel that computes a hop.
        ring_sizes: Numbers of emulated ranks.
        family_seq_length: Tokens of the sequence in the table of input families.
    """
    picture = output.with_suffix(".svg")
    check_outputs(output=output)
    device = device_type()
    choice = choose(kernel, device, DTYPES[dtype], head_dim)
    random = InputFamily(heads=heads, kv_heads=kv_heads)
    inputs = random.inputs(seq_length, head_dim, DTYPES[dtype], device)
    exact = random.exact(seq_length, head_dim, DTYPES[dtype], device)
    layouts = [layout_of(layout, seq_length, size) for size in ring_sizes]
    kernels = {"ours": KERNELS[choice.name], "merged": MergingKernel(KERNELS[choice.name])}
    errors = {
        name: [relative_errors(attention(inputs, x, hop_kernel), exact) for x in layouts]
        for name, hop_kernel in kernels.items()
    }
    flash_4 = [
        relative_errors(attention(inputs, x, RoundedHops(reference)), exact) for x in layouts
    ]
    setting = (
        f"{seq_length} tokens, {heads} query and {kv_heads} key-value heads of {head_dim}, "
        f"{dtype}, causal; layout {layout}, kernel {choice.name} on {device}, emulated ranks"
    )
    smallest_and_largest = (min(ring_sizes), max(ring_sizes))
    end_layouts = [layout_of(layout, family_seq_length, size) for size in smallest_and_largest]
    of_families = {
        name: family_errors(
            family, end_layouts, KERNELS[choice.name], head_dim, DTYPES[dtype], device
        )
        for name, family in FAMILIES.items()
    }
    _draw(picture, ring_sizes, errors, of_families)
    page = _page(picture.name, setting, ring_sizes, errors)
    page += _page_of_flash_4(dtype, ring_sizes, flash_4)
    families = _page_of_families(smallest_and_largest, family_seq_length, of_families)
    output.write_text(page + families)
    print(f"wrote {output}")


def _draw(
    picture: Path,
    ring_sizes: Sequence[int],
    errors: dict[str, list[list[float]]],
    of_families: dict[str, FamilyErrors],
) -> None:
    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.8, 3.8))
    all_axes = above.subplots(1, len(Attention._fields), sharey=True)
    for number, (axes, tensor) in enumerate(zip(all_axes, Attention._fields)):
        for name, rows in errors.items():
            values = [row[number] for row in rows]
            axes.plot(ring_sizes, values, "o-", color=_COLORS[name], label=name)
        axes.set(xscale="log", xlabel="ranks of the ring", title=tensor, ylim=0)
        axes.set_xticks(ring_sizes, [str(size) for size in ring_sizes])
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("relative error")
    all_axes[0].legend(frameon=False)
    _draw_families(below.subplots(), max(ring_sizes), of_families)
    plt.rcParams["svg.hashsalt"] = "precision"
    figure.savefig(picture, metadata={"Date": None})


def _draw_families(axes, ranks: int, of_families: dict[str, FamilyErrors]) -> None:
    rows = range(len(of_families))
    for gradient, marker in zip(GRADIENTS, "os^"):
        growths = [errors.growth(gradient) for errors in of_families.values()]
        axes.plot(growths, rows, marker, color=_COLORS["ours"], fillstyle="none", label=gradient)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(rows, of_families)
    axes.invert_yaxis()
    axes.set(xlabel=f"error on {ranks} ranks over that on one", xlim=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _page(
    picture: str, setting: str, ring_sizes: Sequence[int], errors: dict[str, list[list[float]]]
) -> str:
    first = ring_sizes.index(min(ring_sizes))
    last = ring_sizes.index(max(ring_sizes))
    tensors = range(len(Attention._fields))
    growth = {
        name: max(rows[last][tensor] / rows[first][tensor] for tensor in tensors)
        for name, rows in errors.items()
    }
    header = ["ranks", *(f"{tensor}, {name}" for tensor in Attention._fields for name in errors)]
    table = [table_head(header)]
    for row, size in enumerate(ring_sizes):
        cells = [f"{errors[name][row][tensor]:.5f}" for tensor in tensors for name in errors]
        table.append(table_row([str(size), *cells]))
    lines = [
        *_OPENING,
        "",
        f"Written by `benchmarks/draw_precision.py`: {setting}.",
        "",
        f"![Relative error of output and gradients over ranks]({picture})",
        "",
        *table,
        "",
        f"From {min(ring_sizes)} to {max(ring_sizes)} ranks the worst of the four grows by a "
        f"factor of {growth['ours']:.2f} (ours) and {growth['merged']:.2f} (merged).",
        "",
    ]
    return "\n".join(lines)


def _page_of_flash_4(
    dtype: str, ring_sizes: Sequence[int], errors: Sequence[Sequence[float]]
) -> str:
    table = [table_head(["ranks", *Attention._fields])]
    for size, row in zip(ring_sizes, errors):
        table.append(table_row([str(size), *(f"{error:.5f}" for error in row)]))
    sizes = sorted(ring_sizes)
    of_size = dict(zip(ring_sizes, errors))

    def growth(small: int, large: int) -> float:
        return max(above / below for above, below in zip(of_size[large], of_size[small]))

    smallest, second, largest = sizes[0], sizes[min(1, len(sizes) - 1)], sizes[-1]
    lines = [
        "\n".join(_FLASH_4_OPENING).format(dtype=dtype),
        "",
        *table,
        "",
        f"From {smallest} to {second} ranks the worst of the four grows by a factor of "
        f"{growth(smallest, second):.2f}, and from {second} to {largest} ranks by a factor of "
        f"{growth(second, largest):.2f}.",
        "",
    ]
    return "\n".join(lines)


def _page_of_families(
    smallest_and_largest: tuple[int, int], tokens: int, of_families: dict[str, FamilyErrors]
) -> str:
    first, last = smallest_and_largest
    opening = "\n".join(_FAMILIES_OPENING).format(
        first=first, last=last, window=window_size(tokens), sink=sink_score(tokens), tokens=tokens
    )
    columns = [f"{first}", f"{last}, keys", f"{last}, queries"]
    titles = [f"{gradient}, {column}" for gradient in GRADIENTS for column in columns]
    header = ["inputs", *titles, "growth"]
    table = [table_row(header), table_row(["---", *["---:"] * (len(header) - 1)])]
    for name, errors in of_families.items():
        cells = []
        for gradient in GRADIENTS:
            for of_setting in (errors.alone, errors.keys, errors.queries):
                cells.append(f"{of_setting[gradient]:.5f}")
        table.append(table_row([name, *cells, f"{errors.largest_growth:.2f}"]))
    worst = max(errors.largest_growth for errors in of_families.values())
    lines = [
        opening,
        "",
        *table,
        "",
        f"The largest growth of a gradient's error is {worst:.2f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
