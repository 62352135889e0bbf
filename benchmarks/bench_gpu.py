"""Check every attention kernel on one GPU and time the hops of a ring, by kernel, layout and size.

    make bench-gpu
    python -m benchmarks.bench_gpu --json bench-gpu.json      # the same command

Needs only torch, and Triton for its kernel; no network. Ranks are emulated: the hops of one rank,
the busiest, are timed without communication. For rings of more than eight ranks four hops after
the first stand for all of them. Measurements that --minutes leaves no time for are skipped and
listed.

"triton ordered" is the Triton kernel of deterministic runs, whose backward pass computes seven
products for five.

Rates count the products of visible pairs only, so work that a kernel computes and then masks
lowers its rate. "of single" is the rate relative to that of the fastest kernel on one causal square
of a rank's tokens, forward and backward.

The last lines are rows of kernels/attention/measured.py, from which --attention-kernel auto and
--stripe-size auto choose on this device: the time of each kernel on one of eight striped ranks, by
dtype, without and with documents, and the relative speed of the stripe sizes of each kernel.
benchmarks/report_gpu.py makes them, and a table, from the JSON file, which is complete after every
row.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.common import (
    DTYPES,
    ResultsFile,
    commit,
    layout_name,
    missing_gpu,
    random_inputs,
    setting,
    size_problems,
)
from benchmarks.document_packs import random_starts
from benchmarks.hop_times import HopTimes, time_rank
from benchmarks.overlap_criterion import operations
from benchmarks.report_gpu import measured_lines, stripe_lines
from benchmarks.ring_correctness import correctness
from megatron_ring.context_parallel.hop_cost import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.errors import ConfigError, KernelUnavailable, reporting_errors
from megatron_ring.kernels.attention import (
    KERNELS,
    HopKernel,
    choose,
    reference,
)
from megatron_ring.kernels.attention.determinism import deterministic_algorithms
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.kernels.attention.registry import Feature
from megatron_ring.plan.ring_timeline import visible_pairs_per_hop

STRIPE_SIZES = (1, 128)
PACK_RANKS = 8
MEAN_DOCUMENT_LENGTH = 4096
MAX_CORRECTNESS_TOKENS = 1024
# The most scores of a hop that the reference, which keeps them all in float32, has to compute.
MAX_REFERENCE_SCORES = 2**28


def main() -> None:
    options = _parser().parse_args()
    _check(options)
    torch.set_num_threads(1)  # as a rank on CPUs has
    bench = Bench(options, time.monotonic() + 60 * options.minutes)
    kernels = ", ".join(bench.kernels) or "none"
    print(
        f"{bench.device_name}, torch {torch.__version__}, commit {commit()}, {options.dtype}; "
        f"kernels: {kernels}",
        *bench.unsupported_kernels(),
        sep="\n  ",
        flush=True,
    )
    where = setting("bench_gpu", options, options.device) | {"device": bench.device_name}
    results = ResultsFile(options.json, where)
    # The largest rings come last, so that they are what there is no time for.
    parts = (bench.correctness, bench.orders, bench.packs, bench.layouts)
    for part in parts:
        bench.print_rows(part.__name__, part(), results)
    print("\nfor kernels/attention/measured.py", f"    # {where['command']}", sep="\n")
    lines = measured_lines(results.findings) + stripe_lines(results.findings)
    print(*lines, sep="\n")
    is_wrong = any(not row["correct"] for row in results.findings["correctness"])
    raise SystemExit(is_wrong)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 32768], help="tokens per rank"
    )
    parser.add_argument(
        "--ring-sizes", type=int, nargs="+", default=[1, 8, 64], help="ranks of the emulated rings"
    )
    parser.add_argument(
        "--packs",
        type=int,
        nargs="+",
        default=[65536, 524288],
        help="tokens per pack of documents",
    )
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key-value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--order-dtypes",
        choices=DTYPES,
        nargs="+",
        default=["bf16", "fp16"],
        help="dtypes of the rows for kernels/attention/measured.py",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed rounds, after one warm-up round"
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="start no measurement after this time"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for sizes that are impossible, and where there is no GPU."""
    problems = missing_gpu(options.device, "time the kernels of a CPU, with fewer --tokens")
    problems += size_problems(options, "tokens", "ring_sizes", "packs", "head_dim", "rounds")
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class DeterministicKernel:
    """A kernel as it runs with --deterministic."""

    kernel: HopKernel

    def forward(self, *arguments: Any) -> None:
        """As in ``HopKernel``."""
        with deterministic_algorithms():
            self.kernel.forward(*arguments)

    def backward(self, *arguments: Any) -> None:
        """As in ``HopKernel``."""
        with deterministic_algorithms():
            self.kernel.backward(*arguments)


@dataclass(frozen=True)
class Bench:
    """The measurements; each part yields its rows as dictionaries.

    Attributes:
        deadline: Value of time.monotonic() after which no measurement starts.
        skipped: Measurements of the current part that there was no time for.
    """

    options: argparse.Namespace
    deadline: float
    skipped: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.options.dtype]

    @property
    def device_name(self) -> str:
        """The GPU's name, or the device type, as measured.py names devices."""
        if self.options.device == "cuda":
            return torch.cuda.get_device_name()
        return self.options.device

    # ---- kernels ----

    @property
    def kernels(self) -> dict[str, HopKernel]:
        """The kernels that support this dtype and device, without the reference.

        The Triton kernel is in it twice.
        """
        supported = self._supported_kernels(self.dtype)
        kernels = {name: kernel for name, kernel in supported.items() if kernel is not reference}
        if "triton" in kernels:
            kernels["triton ordered"] = DeterministicKernel(kernels["triton"])
        return kernels

    def _supported_kernels(self, dtype: torch.dtype) -> dict[str, HopKernel]:
        return {
            name: kernel
            for name, kernel in KERNELS.items()
            if not self._why_unsupported(name, dtype)
        }

    def _why_unsupported(self, kernel: str, dtype: torch.dtype) -> str:
        """Return why a kernel does not support such tensors on this device, "" if it does."""
        features = [Feature.GROUPED_HEADS, Feature.DOCUMENTS]
        try:
            choose(kernel, self.options.device, dtype, self.options.head_dim, features)
        except KernelUnavailable as unavailable:
            return str(unavailable)
        return ""

    def unsupported_kernels(self) -> Iterator[str]:
        """Yield for each unsupported kernel why it is not measured."""
        for name in KERNELS:
            if reason := self._why_unsupported(name, self.dtype):
                yield reason

    # ---- the four parts ----

    def correctness(self) -> Iterator[dict[str, Any]]:
        """Compare rings of four ranks with float64 attention on one, over layouts and masks."""
        return correctness(
            self.kernels,
            min(MAX_CORRECTNESS_TOKENS, 2 * self.options.tokens[0]),
            self.options.heads // self.options.kv_heads,
            self.options.head_dim,
            self.options.device,
            self.dtype,
        )

    def layouts(self) -> Iterator[dict[str, Any]]:
        """Time every layout on rings of every size, with the same number of tokens per rank."""
        for tokens in self.options.tokens:
            square = Layout("none", tokens, 1)
            singles = {
                name: self._time_rank(kernel, square, 0, CAUSAL)
                for name, kernel in self.kernels.items()
            }
            rates = (self._rate(single.pairs, single.seconds) for single in singles.values())
            fastest = max(rates, default=0.0)
            sizes_and_kernels = itertools.product(self.options.ring_sizes, self.kernels.items())
            for size, (name, kernel) in sizes_and_kernels:
                for layout in self._layouts(tokens, size):
                    row = {
                        "tokens": tokens,
                        "ranks": size,
                        "layout": layout_name(layout),
                        "kernel": name,
                    }
                    if self._is_out_of_time(row):
                        continue
                    busiest = size - 1 if layout.name == "ring" else size // 2
                    times = singles[name]
                    if size > 1:
                        times = self._time_rank(kernel, layout, busiest, CAUSAL)
                    of_single = self._rate(times.pairs, times.seconds) / fastest
                    yield row | self._figures(times) | {"of_single": of_single}

    def packs(self) -> Iterator[dict[str, Any]]:
        """Time packs on eight ranks, relative to a contiguous ring that ignores the documents."""
        for tokens in self.options.packs:
            starts = random_starts(MEAN_DOCUMENT_LENGTH, tokens)
            mask = Mask(document_starts=starts)
            cases = [(Layout("ring", tokens, PACK_RANKS), CAUSAL, "ignored")]
            cases += [
                (Layout("striped", tokens, PACK_RANKS, x), mask, "applied") for x in STRIPE_SIZES
            ]
            placed = Layout("striped", tokens, PACK_RANKS, placement=DocumentPlacement())
            placements = place_samples(torch.tensor(starts), 1, placed)
            if any(placements):
                cases.append((placed, replace(mask, placements=placements), "placed"))
            baselines = []
            for case, (name, kernel) in itertools.product(cases, self.kernels.items()):
                layout, applied, documents = case
                row = {
                    "tokens": tokens,
                    "layout": layout_name(layout),
                    "kernel": name,
                    "documents": documents,
                }
                if self._is_out_of_time(row):
                    continue
                busiest = int(visible_pairs_per_hop(layout, applied).work_RR.sum(dim=0).argmax())
                times = self._time_rank(kernel, layout, busiest, applied)
                if applied is CAUSAL:
                    baselines.append(times.seconds)
                over_ring = min(baselines, default=float("nan")) / times.seconds
                yield row | self._figures(times) | {"over_ring": over_ring}

    def orders(self) -> Iterator[dict[str, Any]]:
        """Time every kernel on one of eight striped ranks; the rounds of the kernels interleave."""
        tokens = self.options.tokens[0] * PACK_RANKS
        layout = Layout("striped", tokens, PACK_RANKS)
        masks = {
            MaskKind.CAUSAL: CAUSAL,
            MaskKind.SPARSE: Mask(document_starts=random_starts(MEAN_DOCUMENT_LENGTH, tokens)),
        }
        cases = itertools.product(self.options.order_dtypes, masks.items())
        for dtype_name, (kind, mask) in cases:
            row = {"dtype": dtype_name, "mask": kind.name}
            if self._is_out_of_time(row):
                continue
            dtype = DTYPES[dtype_name]
            kernels = {
                name: kernel
                for name, kernel in self._supported_kernels(dtype).items()
                if kernel is not reference or self._reference_fits()
            }
            seconds = {name: [] for name in kernels}
            for _, (name, kernel) in itertools.product(range(self.options.rounds), kernels.items()):
                times = self._time_rank(kernel, layout, PACK_RANKS // 2, mask, dtype)
                seconds[name].append(times.seconds)
            for name, of_rounds in seconds.items():
                yield row | {"kernel": name, "ms": 1e3 * statistics.median(of_rounds)}

    def _reference_fits(self) -> bool:
        return self.options.heads * self.options.tokens[0] ** 2 <= MAX_REFERENCE_SCORES

    # ---- output ----

    def print_rows(self, part: str, rows: Iterator[dict[str, Any]], results: ResultsFile) -> None:
        """Print each row once it is measured and add it to the results; print what was skipped."""
        print(f"\n{part}", flush=True)
        printed = results.findings.setdefault(part, [])
        for row in rows:
            if not printed:
                print("".join(f"{name:>{_width(name)}}" for name in row))
            results.add(part, row)
            cells = (f"{_format(value):>{_width(name)}}" for name, value in row.items())
            print("".join(cells), flush=True)
        for skipped in self.skipped:
            print(f"  skipped, out of time: {skipped}")
        self.skipped.clear()
        results.write()  # also a part without rows

    def _is_out_of_time(self, row: dict[str, Any]) -> bool:
        """Return whether the deadline has passed, and record the row as skipped if so."""
        is_over = time.monotonic() > self.deadline
        if is_over:
            self.skipped.append(" ".join(map(str, row.values())))
        return is_over

    def _rate(
        self, pairs: float, seconds: float, products: int = FORWARD_PRODUCTS + BACKWARD_PRODUCTS
    ) -> float:
        """Return operations per second, for so many matrix products of so many visible pairs."""
        per_pair = operations(products, self.options.heads, self.options.head_dim)
        return pairs * per_pair / seconds

    def _figures(self, times: HopTimes) -> dict[str, float]:
        return {
            "forward_ms": 1e3 * times.forward / times.hops,
            "backward_ms": 1e3 * times.backward / times.hops,
            "forward_tflops": self._rate(times.pairs, times.forward, FORWARD_PRODUCTS) / 1e12,
            "backward_tflops": self._rate(times.pairs, times.backward, BACKWARD_PRODUCTS) / 1e12,
        }

    # ---- timing ----

    def _layouts(self, tokens: int, size: int) -> list[Layout]:
        if size == 1:
            return [Layout("none", tokens, 1)]
        length = tokens * size
        striped = [
            Layout("striped", length, size, stripe)
            for stripe in (*STRIPE_SIZES, tokens // 2)  # the last are the widest
            if tokens % (2 * stripe) == 0
        ]
        return [Layout("ring", length, size), *striped, Layout("zigzag", length, size)]

    def _tensors(self, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return random q, k, v and gradient of the output for so many tokens."""
        options = self.options
        heads = (options.heads, options.kv_heads, options.head_dim)
        return random_inputs(tokens, *heads, options.device, dtype)

    def _time_rank(
        self,
        kernel: HopKernel,
        layout: Layout,
        rank: int,
        mask: Mask,
        dtype: torch.dtype | None = None,
    ) -> HopTimes:
        tensors = self._tensors(layout.shard_length, dtype or self.dtype)
        return time_rank(kernel, tensors, layout, rank, mask, self.options.rounds)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _width(name: str) -> int:
    return max(16 if name in ("layout", "kernel") else 11, len(name) + 2)


if __name__ == "__main__":
    with reporting_errors():
        main()
