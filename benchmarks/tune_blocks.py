"""Time a bounded list of tile sizes of the Triton kernels on this GPU and print the table to paste.

    python -m benchmarks.tune_blocks
    python -m benchmarks.tune_blocks --head-dims 128

For every kernel and head dim all candidates are timed on one causal square, forward or backward:
with the fused kernel, or with the two of deterministic runs, of which the one that is not tuned
keeps the tiles of the table. Candidates that do not fit the GPU are skipped and counted. No file is
written: paste the lines into megatron_ring/kernels/attention/triton/blocks.py and run
tests/kernels/attention/test_triton_compiled.py. Takes minutes, most of them for compiling. Has
never run on a GPU.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.runtime.errors import OutOfResources

from benchmarks.common import gpu_milliseconds
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, hop_key_ranges
from megatron_ring.errors import KernelUnavailable, reporting_errors
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention import triton as kernels
from megatron_ring.kernels.attention.determinism import deterministic_algorithms
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax, zero_accumulators
from megatron_ring.kernels.attention.triton.blocks import (
    TABLE,
    Blocks,
    Generation,
    Kernel,
    blocks_for,
    generation_of,
    has_fused_backward,
)

KERNELS: tuple[Kernel, ...] = ("forward", "fused", "queries", "keys")
ROWS = (32, 64, 128)
COLUMNS = (32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3)
ROWS_PER_WARP = 16  # of a product; with fewer rows, warps repeat each other's work
# Returns the milliseconds of a kernel with a head dim and tile sizes.
Timer = Callable[[Kernel, int, Blocks], float]


def main() -> None:
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            "tune_blocks times Triton kernels on a GPU, and torch finds none. Run it where "
            "torch.cuda.is_available() is true."
        )
    generation = generation_of(torch.device("cuda"))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"{vars(options)}"
    )
    square = Square(options.tokens, options.heads, options.kv_heads, generation)
    print(f'    "{generation}": {{')
    for kernel in KERNELS:
        best = {}
        for head_dim in options.head_dims:
            if kernel == "fused" and not has_fused_backward(head_dim, generation):
                continue  # too few registers
            current = blocks_for(kernel, head_dim, generation)
            best[head_dim] = fastest(kernel, head_dim, current, square.milliseconds)
        if best:
            print(line(kernel, best), flush=True)
    print("    },")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="queries and keys of the square")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key-value heads")
    parser.add_argument(
        "--head-dims",
        type=int,
        nargs="+",
        choices=(64, 128, 256),
        default=[64, 128, 256],
        help="head dims to tune",
    )
    return parser


def candidates(kernel: Kernel, current: Blocks) -> Iterator[Blocks]:
    """Yield ``current``, then all tile sizes in which every warp has rows of its own.

    Rows are queries, or keys in the kernels that accumulate dK and dV.
    """
    yield current
    for rows, columns, warps, stages in itertools.product(ROWS, COLUMNS, WARPS, STAGES):
        if ROWS_PER_WARP * warps > rows:
            continue
        queries, keys = (columns, rows) if kernel in ("fused", "keys") else (rows, columns)
        blocks = Blocks(queries, keys, warps, stages)
        if blocks != current:
            yield blocks


@dataclass(frozen=True)
class Fastest:
    """The fastest tile sizes, and how many of the ``tried`` candidates did not fit the GPU."""

    blocks: Blocks
    milliseconds: float
    tried: int
    too_big: int


def fastest(kernel: Kernel, head_dim: int, current: Blocks, timer: Timer) -> Fastest:
    """Return the fastest candidate; raise KernelUnavailable if none fits the GPU.

    A candidate fits if the GPU has enough shared memory and registers.
    """
    tried = list(candidates(kernel, current))
    times = {}
    for blocks in tried:
        try:
            times[blocks] = timer(kernel, head_dim, blocks)
        except OutOfResources:
            continue
    if not times:
        raise KernelUnavailable(
            f"none of the {len(tried)} candidates of kernel {kernel!r} fits this GPU with head "
            f"dim {head_dim}. Leave it out of --head-dims."
        )
    best = min(times, key=times.__getitem__)
    return Fastest(best, times[best], len(tried), len(tried) - len(times))


def line(kernel: Kernel, best: dict[int, Fastest]) -> str:
    """Return the kernel's line of the table, by head dim, with the times in a comment."""
    entries = []
    comments = []
    for head_dim, result in best.items():
        entries.append(f"{head_dim}: Blocks({', '.join(map(str, result.blocks))})")
        comments.append(f"{result.milliseconds:.3g} ms, {result.too_big} of {result.tried} too big")
    return f'        "{kernel}": {{{", ".join(entries)}}},  # {"; ".join(comments)}'


@dataclass(frozen=True)
class Square:
    """One causal square in bfloat16 on the GPU."""

    tokens: int
    heads: int
    kv_heads: int
    generation: Generation
    device: str = "cuda"

    def milliseconds(self, kernel: Kernel, head_dim: int, blocks: Blocks) -> float:
        """Return the median time of five runs with these tile sizes, after one that compiles.

        Times forward, or the whole backward pass that the kernel is part of.
        """
        with mock.patch.dict(TABLE[self.generation], {kernel: {head_dim: blocks}}):
            run = self._run(kernel, head_dim)
            if kernel in ("queries", "keys"):
                run = deterministic_algorithms()(run)
            run()
            return statistics.median(gpu_milliseconds(run) for _ in range(5))

    def _run(self, kernel: Kernel, head_dim: int) -> Callable[[], None]:
        q, k, v, dout = (
            torch.randn(1, self.tokens, heads, head_dim, device=self.device, dtype=torch.bfloat16)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        key_ranges = hop_key_ranges(Layout("none", self.tokens, 1), 0, 0, CAUSAL)
        inputs = HopInputs(q, k, v, key_ranges, head_dim**-0.5)
        state = RunningSoftmax.empty(q)
        if kernel == "forward":
            return lambda: kernels.forward(inputs, state)
        kernels.forward(inputs, state)
        out = state.out_BLHD.to(q.dtype)
        lse = state.lse_BHL
        accumulators = GradientAccumulators(*map(zero_accumulators, (q, k, v)))
        return lambda: kernels.backward(inputs, dout, out, lse, accumulators)


if __name__ == "__main__":
    with reporting_errors():
        main()
