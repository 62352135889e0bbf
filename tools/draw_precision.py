"""Measure and draw how far attention in a ring is from attention in float64, over sizes of the ring.

python tools/draw_precision.py --output docs/precision.md

One process computes the hops of all ranks, one after the other, in the order of the ring. Beside our state and sums in
float32 there is a ring as most are published: each hop's result is merged into an output of the inputs' type, and the
gradients that travel are of that type, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

from megatron_ring.context_parallel.emulated import Attention, attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import speaking_errors
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose, reference
from megatron_ring.training.precision import device_type

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_OPENING = """# An error that does not grow with the ring

Root mean square of the difference from float64 over that of the exact value. *ours*: the running output and the sums of
gradients are float32 from hop to hop, and rounded once at the end. *merged*: the same kernel in a ring that keeps them
in the inputs' type, as most published ones do.
""".splitlines()
_COLOURS = {"ours": "#55a868", "merged": "#c44e52"}


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
    """
    device = device_type()
    choice = choose(kernel, device, _DTYPES[dtype], head_dim)
    inputs = _inputs((seq_length, head_dim), heads, kv_heads, _DTYPES[dtype], device)
    exact = attention([x.double() for x in inputs], Layout("none", seq_length, 1), reference)
    kernels = {"ours": KERNELS[choice.name], "merged": Merging(KERNELS[choice.name])}
    errors = {
        name: [_errors(attention(inputs, _laid_out(layout, seq_length, size), used), exact) for size in ring_sizes]
        for name, used in kernels.items()
    }
    size = f"{seq_length} tokens, {heads} query and {kv_heads} key-value heads of {head_dim}, {dtype}, causal"
    setting = f"{size}; layout {layout}, kernel {choice.name} on {device}, emulated ranks"
    output.parent.mkdir(parents=True, exist_ok=True)
    _draw(output.with_suffix(".svg"), ring_sizes, errors)
    output.write_text(_page(output.with_suffix(".svg").name, setting, ring_sizes, errors))
    print(f"wrote {output}")


def _laid_out(layout: str, seq_length: int, ring_size: int) -> Layout:
    return Layout(layout if ring_size > 1 else "none", seq_length, ring_size)


def _inputs(shape: tuple[int, int], heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator, (tokens, size) = torch.Generator().manual_seed(1), shape
    drawn = [torch.randn(1, tokens, each, size, generator=generator) for each in (heads, kv_heads, kv_heads, heads)]
    return [x.to(device, dtype) for x in drawn]


def _errors(found: Attention, exact: Attention) -> list[float]:
    """Root mean square of the difference over that of the exact value, of each tensor."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact)]


def _round(x: torch.Tensor, dtype: torch.dtype) -> None:
    x.copy_(x.to(dtype))


def _draw(picture: Path, ring_sizes: Sequence[int], errors: dict[str, list[list[float]]]) -> None:
    figure, axes = plt.subplots(1, len(Attention._fields), figsize=(10, 2.8), sharey=True, layout="tight")
    for number, (one, tensor) in enumerate(zip(axes, Attention._fields)):
        for name, rows in errors.items():
            one.plot(ring_sizes, [row[number] for row in rows], "o-", color=_COLOURS[name], label=name)
        one.set(xscale="log", xlabel="ranks of the ring", title=tensor, ylim=0)
        one.set_xticks(ring_sizes, [str(size) for size in ring_sizes])
        one.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[0].legend(frameon=False)
    plt.rcParams["svg.hashsalt"] = "precision"
    figure.savefig(picture, metadata={"Date": None})


def _page(picture: str, setting: str, ring_sizes: Sequence[int], errors: dict[str, list[list[float]]]) -> str:
    last, first = max(range(len(ring_sizes)), key=ring_sizes.__getitem__), ring_sizes.index(min(ring_sizes))
    growth = {name: max(rows[last][i] / rows[first][i] for i in range(4)) for name, rows in errors.items()}
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
        f"Written by `tools/draw_precision.py`: {setting}.",
        "",
        f"![Relative error of output and gradients over ranks]({picture})",
        "",
        *table,
        "",
        f"From {min(ring_sizes)} to {max(ring_sizes)} ranks the worst of the four grows by a factor of {grown}.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    with speaking_errors():
        tyro.cli(main)
