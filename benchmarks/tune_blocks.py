"""Time a bounded list of tile sizes of Triton's kernels on this GPU, and print the table's lines to paste.

    python -m benchmarks.tune_blocks                     or, for one head size: --head-dims 128

For every kernel and head size all candidates are timed on one causal square, forward or backward; where both kernels of
backward run, the other one keeps the tiles that the table gives it. What does not fit the GPU is left out and counted.
Nothing is written: paste the lines into megatron_ring/kernels/attention/triton/blocks.py, and run
tests/kernels/attention/test_triton_compiled.py. Takes minutes, most of them compiling. Never run on a GPU.
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

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, hop_runs
from megatron_ring.errors import KernelUnavailable, reporting_errors
from megatron_ring.kernels.attention import triton as kernels
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.triton.blocks import (
    TABLE,
    Blocks,
    Generation,
    Kernel,
    blocks_for,
    generation_of,
)

KERNELS: tuple[Kernel, ...] = ("forward", "queries", "keys")
ROWS, COLUMNS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
ROWS_OF_A_WARP = 16  # of a product: fewer, and warps compute what others do
Timer = Callable[[Kernel, int, Blocks], float]


def main() -> None:
    asked = _parser().parse_args()
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            "tune_blocks times Triton's kernels on a GPU, and torch finds none. Run it where "
            "torch.cuda.is_available() is true; elsewhere the table stays as it is."
        )
    generation = generation_of(torch.device("cuda"))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, {vars(asked)}"
    )
    square = Square(asked.tokens, asked.heads, asked.kv_heads, generation)
    print(f'    "{generation}": {{')
    for kernel in KERNELS:
        now = {head: blocks_for(kernel, head, generation) for head in asked.head_dims}
        found = {
            head: fastest(kernel, head, blocks, square.milliseconds) for head, blocks in now.items()
        }
        print(line(kernel, found), flush=True)
    print("    },")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="queries and keys of the square")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument(
        "--head-dims", type=int, nargs="+", choices=(64, 128, 256), default=[64, 128, 256]
    )
    return parser


def candidates(kernel: Kernel, now: Blocks) -> Iterator[Blocks]:
    """What the table has ``now``, and tiles in which every warp has rows of its own: of keys, where dK is summed."""
    yield now
    for rows, columns, warps, stages in itertools.product(ROWS, COLUMNS, WARPS, STAGES):
        if ROWS_OF_A_WARP * warps <= rows:
            queries, keys = (columns, rows) if kernel == "keys" else (rows, columns)
            if (blocks := Blocks(queries, keys, warps, stages)) != now:
                yield blocks


@dataclass(frozen=True)
class Found:
    """blocks: the fastest. Candidates that did not fit the GPU are ``left_out`` of all ``tried``."""

    blocks: Blocks
    milliseconds: float
    tried: int
    left_out: int


def fastest(kernel: Kernel, head: int, now: Blocks, timed: Timer) -> Found:
    """Of all candidates that this GPU has the shared memory and registers for."""
    times, tried = {}, list(candidates(kernel, now))
    for blocks in tried:
        try:
            times[blocks] = timed(kernel, head, blocks)
        except OutOfResources:
            continue
    if not times:
        raise KernelUnavailable(
            f"none of the {len(tried)} candidates of {kernel!r} fits this GPU at head size {head}"
        )
    best = min(times, key=times.__getitem__)
    return Found(best, times[best], len(tried), len(tried) - len(times))


def line(kernel: Kernel, found: dict[int, Found]) -> str:
    """The kernel's line of the table, by head size, and how long its fastest took."""
    sizes = ", ".join(
        f"{head}: Blocks({', '.join(map(str, one.blocks))})" for head, one in found.items()
    )
    told = "; ".join(
        f"{one.milliseconds:.3g} ms, {one.left_out} of {one.tried} too big"
        for one in found.values()
    )
    return f'        "{kernel}": {{{sizes}}},  # {told}'


@dataclass(frozen=True)
class Square:
    """One causal square of bfloat16 on the GPU."""

    tokens: int
    heads: int
    kv_heads: int
    generation: Generation
    device: str = "cuda"

    def milliseconds(self, kernel: Kernel, head: int, blocks: Blocks) -> float:
        """Of forward or of backward with these tiles: the median of five, after one that compiles."""
        with mock.patch.dict(TABLE[self.generation], {kernel: {head: blocks}}):
            act = self._work(kernel, head)
            act()
            return statistics.median(_timed(act) for _ in range(5))

    def _work(self, kernel: Kernel, head: int) -> Callable[[], None]:
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        shapes = [(1, self.tokens, each, head) for each in heads]
        q, k, v, dout = (
            torch.randn(shape, device=self.device, dtype=torch.bfloat16) for shape in shapes
        )
        runs, scale, state = (
            hop_runs(Layout("none", self.tokens, 1), 0, 0, CAUSAL),
            head**-0.5,
            RunningSoftmax.empty(q),
        )
        if kernel == "forward":
            return lambda: kernels.forward(q, k, v, runs, scale, state)
        kernels.forward(q, k, v, runs, scale, state)
        out, sums = (
            state.out_BLHD.to(q.dtype),
            [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)],
        )
        return lambda: kernels.backward(dout, q, k, v, out, state.lse_BHL, runs, scale, *sums)


def _timed(act: Callable[[], None]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    act()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


if __name__ == "__main__":
    with reporting_errors():
        main()
