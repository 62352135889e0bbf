"""Time a bounded list of tile sizes of the Triton kernels on this GPU and print the table to paste.

    make tune-gpu
    python -m benchmarks.tune_blocks --head-dims 64 128 256 --minutes 5 --json tune-blocks.json

For every kernel and head dim all candidates are timed on one causal square, forward or backward:
with the fused kernel, or with the two of deterministic runs, of which the one that is not tuned
keeps the tiles of the table. Candidates that do not fit the GPU, or do not compile, are skipped and
counted. Most of the time is compilation, so --jobs processes compile all candidates first, on a
small square, into Triton's cache on disk. The tiles of the table are timed first; candidates that
--minutes leaves no time for are counted.

No file of the package is written: paste the lines into
megatron_ring/kernels/attention/triton/blocks.py and run
tests/kernels/attention/test_triton_compiled.py. Has never run on a GPU.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
import triton
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from benchmarks.common import ResultsFile, gpu_milliseconds, setting, size_problems
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, hop_key_ranges
from megatron_ring.errors import ConfigError, KernelUnavailable, reporting_errors
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
COMPILE_SHARE = 0.6  # of --minutes: what is not compiled by then is compiled where it is timed
SMALL_SQUARE = 256  # tokens; a multiple of 16, as --tokens is, for which kernels are specialized
ROWS_PER_WARP = 16  # of a product; with fewer rows, warps repeat each other's work
# Returns the milliseconds of a kernel with a head dim and tile sizes.
Timer = Callable[[Kernel, int, Blocks], float]


def main() -> None:
    options = _parser().parse_args()
    if problems := size_problems(options, "tokens", "jobs"):
        raise ConfigError(problems)
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            "tune_blocks times Triton kernels on a GPU, and torch finds none. Run it where "
            "torch.cuda.is_available() is true."
        )
    seconds = 60 * options.minutes
    start = time.monotonic()
    generation = generation_of(torch.device("cuda"))
    results = ResultsFile(options.json, setting("tune_blocks", options, "cuda"))
    results.findings["generation"] = generation
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"{vars(options)}"
    )
    square = Square(options.tokens, options.heads, options.kv_heads, generation)
    compile_candidates(square, options.head_dims, options.jobs, start + COMPILE_SHARE * seconds)
    tune(square, options.head_dims, start + seconds, results)


def tune(square: "Square", head_dims: Sequence[int], deadline: float, results: ResultsFile) -> None:
    """Print the fastest tiles of every kernel, and add them to ``results`` as they are found."""
    print(f'    "{square.generation}": {{')
    for kernel in KERNELS:
        best = {}
        for head_dim in head_dims:
            if not is_used(kernel, head_dim, square.generation):
                continue
            current = blocks_for(kernel, head_dim, square.generation)
            best[head_dim] = fastest(kernel, head_dim, current, square.milliseconds, deadline)
            found = asdict(best[head_dim]) | {"kernel": kernel, "head_dim": head_dim}
            results.add("blocks", found)
        if best:
            print(line(kernel, best), flush=True)
    print("    },")


def is_used(kernel: Kernel, head_dim: int, generation: str) -> bool:
    """Return whether a GPU of ``generation`` has enough registers for the kernel."""
    return kernel != "fused" or has_fused_backward(head_dim, generation)


def compile_candidates(
    square: "Square",
    head_dims: Sequence[int],
    jobs: int,
    deadline: float,
    start_method: str = "spawn",
) -> int:
    """Compile all candidates in ``jobs`` processes; return how many are done by the deadline.

    A kernel's machine code depends on tile sizes, head dim and number of heads, and not on the
    number of tokens. Candidates that do not compile fail again where they are timed.
    """
    small = replace(square, tokens=SMALL_SQUARE)
    start = time.monotonic()
    cases = [
        (kernel, head_dim, blocks)
        for head_dim in head_dims
        for kernel in KERNELS
        if is_used(kernel, head_dim, square.generation)
        for blocks in candidates(kernel, blocks_for(kernel, head_dim, square.generation))
    ]
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures: list[Future[None]] = [pool.submit(small.run_once, *case) for case in cases]
        seconds = None if math.isinf(deadline) else max(0.0, deadline - start)
        done, _ = wait(futures, timeout=seconds)
        pool.shutdown(wait=False, cancel_futures=True)
    print(
        f"{len(done)} of {len(cases)} candidates compiled by {jobs} processes in "
        f"{time.monotonic() - start:.0f} s",
        flush=True,
    )
    return len(done)


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
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that compile; by default as many as there are cores",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="time no candidate after this time"
    )
    parser.add_argument("--json", default="", help="also write the results to this file")
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
    """The fastest tile sizes, and how many candidates were timed, too big, broken and left out.

    too_big: did not fit the GPU. failed: did not compile or run. late: came after the deadline.
    """

    blocks: Blocks
    milliseconds: float
    tried: int
    too_big: int
    failed: int = 0
    late: int = 0


def fastest(
    kernel: Kernel, head_dim: int, current: Blocks, timer: Timer, deadline: float = math.inf
) -> Fastest:
    """Return the fastest candidate; raise KernelUnavailable if none runs on this GPU.

    A candidate fits if the GPU has enough shared memory and registers. The first one is timed
    whatever the ``deadline``, a value of time.monotonic(), is.
    """
    times = {}
    too_big = failed = late = 0
    all_candidates = list(candidates(kernel, current))
    for blocks in all_candidates:
        if times and time.monotonic() > deadline:
            late += 1
            continue
        try:
            times[blocks] = timer(kernel, head_dim, blocks)
        except OutOfResources:
            too_big += 1
        except (TritonError, RuntimeError) as error:
            failed += 1
            print(f"        # {kernel}, {head_dim}: {blocks} failed: {_first_line(error)}")
    if not times:
        raise KernelUnavailable(
            f"none of the {len(all_candidates)} candidates of kernel {kernel!r} fits this GPU with "
            f"head dim {head_dim}. Leave it out of --head-dims."
        )
    best = min(times, key=times.__getitem__)
    return Fastest(best, times[best], len(all_candidates), too_big, failed, late)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def line(kernel: Kernel, best: dict[int, Fastest]) -> str:
    """Return the kernel's line of the table, by head dim, with the times in a comment."""
    entries = []
    comments = []
    for head_dim, result in best.items():
        entries.append(f"{head_dim}: Blocks({', '.join(map(str, result.blocks))})")
        comment = f"{result.milliseconds:.3g} ms, {result.too_big} of {result.tried} too big"
        comment += f", {result.failed} failed" if result.failed else ""
        comment += f", {result.late} not timed" if result.late else ""
        comments.append(comment)
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

    def run_once(self, kernel: Kernel, head_dim: int, blocks: Blocks) -> None:
        """Run forward or backward once with these tile sizes, which compiles the kernel."""
        with mock.patch.dict(TABLE[self.generation], {kernel: {head_dim: blocks}}):
            self._run(kernel, head_dim)()

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
