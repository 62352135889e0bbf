"""On one GPU: whether every kernel is right, and how fast a hop of the ring is, by kernel, layout and size of the ring.

    make bench-gpu                                             or: python -m benchmarks.bench_gpu --json bench-gpu.json

Needs torch, and Triton for its kernel; nothing else, and no network. Ranks are emulated: one rank's hops are timed, the
busiest's, and communication is not there. Of rings of more than eight ranks four hops behind the first stand for all.
What the minutes do not suffice for is left out, and said.

Rates count the products of visible pairs alone, so that what a kernel computes and masks away lowers its rate. "of
single" is a rate over that of the fastest kernel in one causal square of a rank's tokens, forward and backward.

The last lines are those of kernels/attention/measured.py, by which --attention-kernel auto goes on this device: which
kernel is the fastest on a rank of eight, striped, in each type, without and with documents.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common import DTYPES, commit, write_json
from benchmarks.document_packs import random_starts
from benchmarks.emulated_ring import attention
from benchmarks.overlap_criterion import operations
from megatron_ring.context_parallel.counted import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_runs
from megatron_ring.errors import KernelUnavailable, reporting_errors
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose, reference
from megatron_ring.kernels.attention.accuracy import TOLERANCE, error
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.support import Feature
from megatron_ring.plan.timeline import counted

STRIPES = 1, 128
PACK_RANKS, MEAN_DOCUMENT = 8, 4096
# Of a hop's scores, in float32: more the reference, which keeps them all, is not asked to compute.
MOST_SCORES = 2**28


def main() -> None:
    asked = _parser().parse_args()
    torch.set_num_threads(1)  # of a CPU, as a rank has
    bench = Bench(asked, time.monotonic() + 60 * asked.minutes)
    print(f"{bench.device_name}, torch {torch.__version__}, commit {commit()}, {asked.dtype}; "
          f"kernels: {', '.join(bench.kernels) or 'none'}", *bench.refusals(), sep="\n  ", flush=True)  # fmt: skip
    parts = bench.correctness, bench.orders, bench.layouts, bench.packs
    found = {part.__name__: bench.told(part.__name__, part()) for part in parts}
    print("\nfor kernels/attention/measured.py", *bench.lines(found["orders"]), sep="\n")
    about = {
        "device": bench.device_name,
        "torch": torch.__version__,
        "commit": commit(),
        "asked": vars(asked),
    }
    write_json(asked.json, about | found)
    raise SystemExit(any(not row["right"] for row in found["correctness"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a rank")
    parser.add_argument("--ring-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--packs", type=int, nargs="+", default=[65536, 524288], help="tokens of packed documents"
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--order-dtypes",
        choices=DTYPES,
        nargs="+",
        default=["bf16", "fp16"],
        help="of the last lines",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one that warms up")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="after which no other measurement is begun"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", default="", help="write the results to this file too")
    return parser


@dataclass(frozen=True)
class Bench:
    """What is measured, each part as rows of figures. until: time.monotonic() of the end."""

    asked: argparse.Namespace
    until: float
    left_out: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.asked.dtype]

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.asked.device == "cuda" else self.asked.device

    @property
    def kernels(self) -> dict[str, HopKernel]:
        """Those that take such tensors here, without the one that all are compared with."""
        return {
            name: kernel
            for name, kernel in self._able(self.dtype).items()
            if kernel is not reference
        }

    def _able(self, dtype: torch.dtype) -> dict[str, HopKernel]:
        return {name: kernel for name, kernel in KERNELS.items() if not self._refusal(name, dtype)}

    def _refusal(self, kernel: str, dtype: torch.dtype) -> str:
        """Why a kernel does not take such tensors here, "" where it does."""
        try:
            choose(
                kernel,
                self.asked.device,
                dtype,
                self.asked.head_dim,
                [Feature.GROUPED_HEADS, Feature.DOCUMENTS],
            )
        except KernelUnavailable as refused:
            return str(refused)
        return ""

    def refusals(self) -> Iterator[str]:
        yield from filter(None, (self._refusal(name, self.dtype) for name in KERNELS))

    def correctness(self) -> Iterator[dict[str, Any]]:
        """Rings of four over layouts and masks, against the reference in float64."""
        tokens = 1024
        masks = {"causal": CAUSAL, "window": Mask(window=100)}
        masks["documents"] = Mask(document_starts=random_starts(100, tokens))
        layouts = [
            Layout("ring", tokens, 4),
            Layout("striped", tokens, 4),
            Layout("striped", tokens, 4, 32),
        ]
        inputs = [x[:1, :, : max(1, x.shape[2] // 8)] for x in self._tensors(tokens, self.dtype)]
        for (said, mask), layout in itertools.product(
            masks.items(), [*layouts, Layout("zigzag", tokens, 4)]
        ):
            exact = attention([x.double() for x in inputs], layout, reference, mask)
            for name, kernel in self.kernels.items():
                errors = attention(inputs, layout, kernel, mask)
                errors = [error(x, y) for x, y in zip(errors, exact)]
                shown = {"kernel": name, "layout": _named(layout), "mask": said}
                worst = dict(zip(("out", "dq", "dk", "dv"), errors))
                yield shown | worst | {"right": all(x <= TOLERANCE[self.dtype] for x in errors)}

    def layouts(self) -> Iterator[dict[str, Any]]:
        """Every layout on rings of every size, each rank with as many tokens."""
        for tokens in self.asked.tokens:
            square = Layout("none", tokens, 1)
            singles = {
                name: self._rank(kernel, square, 0, CAUSAL) for name, kernel in self.kernels.items()
            }
            fastest = max(
                (self._rate(single.pairs, single.seconds) for single in singles.values()),
                default=0.0,
            )
            for size, (name, kernel) in itertools.product(
                self.asked.ring_sizes, self.kernels.items()
            ):
                for layout in self._layouts(tokens, size):
                    shown = {
                        "tokens": tokens,
                        "ranks": size,
                        "layout": _named(layout),
                        "kernel": name,
                    }
                    if self._is_over(shown):
                        continue
                    busiest = size - 1 if layout.name == "ring" else size // 2
                    spent = (
                        singles[name] if size == 1 else self._rank(kernel, layout, busiest, CAUSAL)
                    )
                    yield (
                        shown
                        | self._figures(spent)
                        | {"of_single": self._rate(spent.pairs, spent.seconds) / fastest}
                    )

    def packs(self) -> Iterator[dict[str, Any]]:
        """Packed documents on eight ranks, over a contiguous ring that computes as if they were one."""
        for tokens in self.asked.packs:
            mask, before = Mask(document_starts=random_starts(MEAN_DOCUMENT, tokens)), []
            ignoring = Layout("ring", tokens, PACK_RANKS)
            striped = [Layout("striped", tokens, PACK_RANKS, stripe) for stripe in STRIPES]
            cases = [(ignoring, CAUSAL), *((layout, mask) for layout in striped)]
            for (layout, seen), (name, kernel) in itertools.product(cases, self.kernels.items()):
                shown = {"tokens": tokens, "layout": _named(layout), "kernel": name}
                shown["documents"] = "seen" if seen is mask else "ignored"
                if self._is_over(shown):
                    continue
                busiest = int(counted(layout, seen).work_RR.sum(dim=0).argmax())
                spent = self._rank(kernel, layout, busiest, seen)
                before += [spent.seconds] * (seen is CAUSAL)
                yield (
                    shown
                    | self._figures(spent)
                    | {"over_ring": min(before, default=float("nan")) / spent.seconds}
                )

    def orders(self) -> Iterator[dict[str, Any]]:
        """Every kernel on one of eight striped ranks, a round of each after a round of the other."""
        tokens = self.asked.tokens[0] * PACK_RANKS
        layout = Layout("striped", tokens, PACK_RANKS)
        masks = {
            MaskKind.CAUSAL: CAUSAL,
            MaskKind.SPARSE: Mask(document_starts=random_starts(MEAN_DOCUMENT, tokens)),
        }
        for named, (kind, mask) in itertools.product(self.asked.order_dtypes, masks.items()):
            kernels = {
                name: kernel
                for name, kernel in self._able(DTYPES[named]).items()
                if self._fits(kernel)
            }
            if self._is_over(shown := {"dtype": named, "mask": kind.name}):
                continue
            spent = {name: [] for name in kernels}
            for _, (name, kernel) in itertools.product(range(self.asked.rounds), kernels.items()):
                spent[name].append(
                    self._rank(kernel, layout, PACK_RANKS // 2, mask, DTYPES[named]).seconds
                )
            for name, rounds in spent.items():
                yield shown | {"kernel": name, "ms": 1e3 * statistics.median(rounds)}

    def _fits(self, kernel: HopKernel) -> bool:
        return (
            kernel is not reference or self.asked.heads * self.asked.tokens[0] ** 2 <= MOST_SCORES
        )

    def lines(self, orders: list[dict[str, Any]]) -> Iterator[str]:
        """The rows of ``orders`` as the lines of measured.py, and the command as a comment before them."""
        yield f"    # {' '.join(sys.argv)}"
        source = f"commit {commit()}, torch {torch.__version__}"
        for (dtype, mask), rows in itertools.groupby(
            orders, lambda row: (row["dtype"], row["mask"])
        ):
            spent = ", ".join(f'"{row["kernel"]}": {row["ms"]:.4g}' for row in rows)
            yield f'    Measured("{self.device_name}", {DTYPES[dtype]}, MaskKind.{mask}, {{{spent}}}, "{source}"),'

    def told(self, part: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Print the rows as they come, and what there was no time for."""
        print(f"\n{part}", flush=True)
        kept = []
        for row in rows:
            if not kept:
                print("".join(f"{name:>{_width(name)}}" for name in row))
            kept.append(row)
            print(
                "".join(f"{_shown(value):>{_width(name)}}" for name, value in row.items()),
                flush=True,
            )
        for row in self.left_out:
            print(f"  no time was left for {row}")
        self.left_out.clear()
        return kept

    def _is_over(self, shown: dict[str, Any]) -> bool:
        if over := time.monotonic() > self.until:
            self.left_out.append(" ".join(map(str, shown.values())))
        return over

    def _layouts(self, tokens: int, size: int) -> list[Layout]:
        if size == 1:
            return [Layout("none", tokens, 1)]
        length = tokens * size
        stripes = [
            Layout("striped", length, size, stripe)
            for stripe in STRIPES
            if tokens % (2 * stripe) == 0
        ]
        return [Layout("ring", length, size), *stripes, Layout("zigzag", length, size)]

    def _tensors(self, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output of so many tokens."""
        generator = torch.Generator(self.asked.device).manual_seed(0)
        heads = self.asked.heads, self.asked.kv_heads, self.asked.kv_heads, self.asked.heads
        shapes = [(1, tokens, each, self.asked.head_dim) for each in heads]
        return [
            torch.randn(shape, generator=generator, device=self.asked.device).to(dtype)
            for shape in shapes
        ]

    def _rank(
        self,
        kernel: HopKernel,
        layout: Layout,
        rank: int,
        mask: Mask,
        dtype: torch.dtype | None = None,
    ) -> "Spent":
        """One rank's hops. Every hop has the same tensors, and continues one softmax."""
        q, k, v, dout = self._tensors(layout.shard_length, dtype or self.dtype)
        scale, size = q.shape[-1] ** -0.5, layout.ring_size
        state = RunningSoftmax.empty(q)
        sums = [torch.zeros_like(x, dtype=state.out_BLHD.dtype) for x in (q, k, v)]
        hops = (
            []
            if size == 1
            else sorted({1 + (size - 2) * i // 3 for i in range(4)} if size > 8 else range(1, size))
        )

        def timed(hop: int) -> Spent:
            runs = hop_runs(layout, rank, (rank - hop) % size, mask)
            forward = self._seconds(lambda: kernel.forward(q, k, v, runs, scale, state))
            out = state.out_BLHD.to(q.dtype)
            backward = self._seconds(
                lambda: kernel.backward(dout, q, k, v, out, state.lse_BHL, runs, scale, *sums)
            )
            return Spent(1, runs.visible_pairs, forward, backward)

        first, others = timed(0), [timed(hop) for hop in hops]
        return first + sum(others, Spent()) * ((size - 1) / len(others)) if others else first

    def _seconds(self, act: Callable[[], None]) -> float:
        act()
        return statistics.median(self._once(act) for _ in range(self.asked.rounds))

    def _once(self, act: Callable[[], None]) -> float:
        if self.asked.device != "cuda":
            began = (
                time.process_time()
            )  # what this process worked, whatever else the machine did meanwhile
            act()
            return time.process_time() - began
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        act()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    def _rate(
        self, pairs: float, seconds: float, products: int = FORWARD_PRODUCTS + BACKWARD_PRODUCTS
    ) -> float:
        """Operations a second of so many products of so many visible pairs."""
        return pairs * operations(products, self.asked.heads, self.asked.head_dim) / seconds

    def _figures(self, spent: "Spent") -> dict[str, float]:
        return {
            "forward_ms": 1e3 * spent.forward / spent.hops,
            "backward_ms": 1e3 * spent.backward / spent.hops,
            "forward_tflops": self._rate(spent.pairs, spent.forward, FORWARD_PRODUCTS) / 1e12,
            "backward_tflops": self._rate(spent.pairs, spent.backward, BACKWARD_PRODUCTS) / 1e12,
        }


@dataclass(frozen=True)
class Spent:
    """Of some hops: how many, their visible pairs, and seconds."""

    hops: float = 0
    pairs: float = 0
    forward: float = 0
    backward: float = 0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, times: float) -> "Spent":
        return Spent(*(value * times for value in vars(self).values()))


def _named(layout: Layout) -> str:
    return layout.name + f" by {layout.stripe_size}" * (layout.stripe_size > 1)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _width(name: str) -> int:
    return max(16 if name in ("layout", "kernel") else 11, len(name) + 2)


if __name__ == "__main__":
    with reporting_errors():
        main()
