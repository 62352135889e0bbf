"""Check on one GPU that a ring's messages run under its kernels and that no hop blocks the host.

    python -m benchmarks.trace_overlap --json trace-overlap.json --traces runs/traces
    python -m benchmarks.trace_overlap --ranks 4 --tokens 4096 --layout zigzag --kernels triton

Needs only torch, and Triton for its kernel; no network. The package's ring runs in one process with
a thread and two streams per rank (streamed_ring.py); messages are copies within the GPU. For each
kernel and mask it reports:

- correct: the results equal those of the same hops one after another on one stream, within
  rounding. A race would show here.
- host waits: with torch.cuda.set_sync_debug_mode("error") and masks that are not on the device yet,
  the source line of a hop that blocks the host. There should be none.
- per rank, forward and backward, from the profiler's trace: the number of messages, their time in
  milliseconds, and the shares of it under kernels of the same rank and of any rank. --traces keeps
  the traces, for Chrome and Perfetto.

The exit code is 0 only if all results are correct and nothing blocks the host. On a CPU the same
ring runs without streams and is not traced. The ranks share one GPU, so kernels and copies compete
there for resources that ranks with a GPU each would not share.
"""

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import emulated_ring
from benchmarks.common import (
    DTYPES,
    check_outputs,
    missing_gpu,
    random_inputs,
    ring_problems,
    write_json,
)
from benchmarks.device_trace import Overlap, overlaps
from benchmarks.document_packs import random_starts
from benchmarks.streamed_ring import StreamExchange, Streams, on_every_rank
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.errors import ConfigError, KernelUnavailable, reporting_errors
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose
from megatron_ring.kernels.attention.accuracy import TOLERANCE, error
from megatron_ring.kernels.attention.registry import Feature

T = TypeVar("T")
MASKS = ("causal", "documents")


def main() -> None:
    options = _parser().parse_args()
    check_outputs(json=options.json)
    _check(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(
        f"{device}, torch {torch.__version__}, {options.ranks} ranks of {options.tokens} tokens, "
        f"{options.layout}, {options.heads} heads of {options.head_dim}, "
        f"{options.kv_heads} key-value heads, {options.dtype}"
    )
    traces = Path(options.traces) if options.traces else None
    cases = []
    for kernel in _kernels(options):
        for mask in MASKS:
            findings = Case.build(options, kernel, mask).examine(traces)
            _print_case(findings)
            cases.append(findings)
    setting = {"device": device, "torch": torch.__version__, "options": vars(options)}
    write_json(options.json, setting | {"cases": cases})
    raise SystemExit(any(case["host_waits"] or not case["correct"] for case in cases))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the ring")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per rank")
    parser.add_argument("--layout", choices=["ring", "striped", "zigzag"], default="striped")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key-value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--mean-document", type=int, default=4096, help="mean length of a document in tokens"
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=[],
        help="kernels to check; by default all that this device supports, without the reference",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--traces", default="", help="keep the traces in this folder")
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def _check(options: argparse.Namespace) -> None:
    problems = ring_problems(options, "head_dim", "mean_document")
    problems += missing_gpu(options.device, "run without streams and traces")
    if problems:
        raise ConfigError(problems)


def _kernels(options: argparse.Namespace) -> list[str]:
    """Return --kernels; by default all supported ones without the reference."""

    def is_supported(name: str) -> bool:
        dtype = DTYPES[options.dtype]
        try:
            choose(name, options.device, dtype, options.head_dim, {Feature.DOCUMENTS})
        except KernelUnavailable:
            return False
        return True

    if options.kernels:
        return options.kernels
    return [name for name in KERNELS if name != "reference" and is_supported(name)]


class Shard(NamedTuple):
    """The tensors of one rank."""

    q: torch.Tensor
    kv: torch.Tensor
    dout: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A ring on the device with one kernel and one mask.

    Attributes:
        names: The names of kernel and mask.
        inputs: q, k, v and the gradient of the output, of the whole sequence.
    """

    names: dict[str, str]
    kernel: HopKernel
    layout: Layout
    mask: Mask
    inputs: list[torch.Tensor]
    streams: list[Streams]

    @staticmethod
    def build(options: argparse.Namespace, kernel: str, mask: str) -> "Case":
        length = options.ranks * options.tokens
        masks = {
            "causal": CAUSAL,
            "documents": Mask(document_starts=random_starts(options.mean_document, length)),
        }
        heads = (options.heads, options.kv_heads, options.head_dim)
        inputs = random_inputs(length, *heads, options.device, DTYPES[options.dtype])
        return Case(
            names={"kernel": kernel, "mask": mask},
            kernel=KERNELS[kernel],
            layout=Layout(options.layout, length, options.ranks),
            mask=masks[mask],
            inputs=inputs,
            streams=[Streams.of_device(options.device) for _ in range(options.ranks)],
        )

    @property
    def on_gpu(self) -> bool:
        return self.inputs[0].is_cuda

    def examine(self, traces: Path | None) -> dict[str, Any]:
        """Return the findings of this case; keep the traces in the folder ``traces``."""
        shards = [self._shard(rank) for rank in range(self.layout.ring_size)]
        # Runs first: it compiles the kernels and puts on the device what the streams share.
        expected = emulated_ring.attention(self.inputs, self.layout, self.kernel, self.mask)
        self._synchronize()
        forwards = self._forward(shards)
        self._synchronize()
        backwards = self._backward(shards, forwards)
        self._synchronize()
        findings = self.names | {"correct": self._is_correct(forwards, backwards, expected)}
        if not self.on_gpu:
            return findings | {"host_waits": None, "overlap": []}
        passes = {
            "forward": lambda: self._forward(shards),
            "backward": lambda: self._backward(shards, forwards),
        }
        # Without cached key ranges every hop has some to copy to the device.
        self.mask.cached_key_ranges.clear()
        waits = [line for run in passes.values() if (line := _first_host_wait(run))]
        rows = []
        for direction, run in passes.items():
            rows += self._overlap_rows(direction, run, traces)
        return findings | {"host_waits": waits, "overlap": rows}

    def _shard(self, rank: int) -> Shard:
        q, k, v, dout = (self._rows(x, rank) for x in self.inputs)
        return Shard(q, torch.stack([k, v]), dout)

    def _rows(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        return whole[:, self.layout.positions(rank).to(whole.device)]

    def _forward(self, shards: list[Shard]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return out and lse of each rank."""

        def run_rank(rank: int, exchange: StreamExchange) -> tuple[torch.Tensor, torch.Tensor]:
            return ring_loop.forward(shards[rank].q, shards[rank].kv, self._ring(rank, exchange))

        return on_every_rank(self.streams, run_rank)

    def _backward(
        self, shards: list[Shard], forwards: list
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return dq and dkv of each rank."""

        def run_rank(rank: int, exchange: StreamExchange) -> tuple[torch.Tensor, torch.Tensor]:
            q, kv, dout = shards[rank]
            out, lse = forwards[rank]
            return ring_loop.backward(dout, None, q, kv, out, lse, self._ring(rank, exchange))

        return on_every_rank(self.streams, run_rank)

    def _ring(self, rank: int, exchange: StreamExchange) -> ring_loop.Ring:
        scale = self.inputs[0].shape[-1] ** -0.5
        return ring_loop.Ring(self.layout, rank, self.kernel, scale, exchange, self.mask)

    def _synchronize(self) -> None:
        """Wait for the device, so that every stream may use the results."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _is_correct(
        self, forwards: list, backwards: list, expected: emulated_ring.Attention
    ) -> bool:
        tolerance = TOLERANCE[self.inputs[0].dtype]
        for rank in range(self.layout.ring_size):
            out, _ = forwards[rank]
            dq, (dk, dv) = backwards[rank]
            for actual, whole in zip((out, dq, dk, dv), expected):
                if not error(actual, self._rows(whole, rank)) <= tolerance:
                    return False
        return True

    def _overlap_rows(
        self, direction: str, run: Callable[[], object], traces: Path | None
    ) -> list[dict[str, Any]]:
        """Trace one pass and return a row for each rank."""
        name = "-".join([*self.names.values(), direction])
        with tempfile.TemporaryDirectory() as temporary:
            path = (traces or Path(temporary)) / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            of_ranks = self._trace(run, path)
        return [
            {"direction": direction, "rank": rank} | _row(overlap)
            for rank, overlap in enumerate(of_ranks)
        ]

    def _trace(self, run: Callable[[], object], path: Path) -> list[Overlap]:
        markers = [(2 * rank + 1, 2 * rank + 2) for rank in range(self.layout.ring_size)]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            self._mark_streams(markers)
        profiler.export_chrome_trace(str(path))
        return overlaps(json.loads(path.read_text())["traceEvents"], markers)

    def _mark_streams(self, markers: list[tuple[int, int]]) -> None:
        """Copy a distinct number of bytes on each stream, by which the trace identifies it."""
        source = self.inputs[0].new_zeros(2 * len(markers), dtype=torch.uint8)
        target = torch.zeros_like(source)
        torch.cuda.synchronize()
        for own, sizes in zip(self.streams, markers):
            for stream, size in zip((own.hops, own.messages), sizes):
                with own.on(stream):
                    target[:size].copy_(source[:size])
        torch.cuda.synchronize()  # before the profiler stops


def _first_host_wait(run: Callable[[], object]) -> str:
    """Return the first source line of the package that blocks the host, "" if none does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        in_package = [frame for frame in frames if "megatron_ring" in frame.filename]
        last = (in_package or frames)[-1]
        return f"{last.filename}:{last.lineno}: {last.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return ""


def _row(overlap: Overlap) -> dict[str, Any]:
    time = overlap.message_time
    return {
        "messages": overlap.messages,
        "messages_ms": time / 1e3,
        "kernels_ms": overlap.kernel_time / 1e3,
        "under_own": overlap.under_own / time if time else 0.0,
        "under_any": overlap.under_any / time if time else 0.0,
    }


def _print_case(case: dict[str, Any]) -> None:
    waits = "not checked on a CPU"
    if case["host_waits"] is not None:
        waits = "; ".join(case["host_waits"]) or "none"
    verdict = "correct" if case["correct"] else "WRONG"
    print(f"\n{case['kernel']}, {case['mask']}: {verdict}; host waits: {waits}", flush=True)
    if case["overlap"]:
        print("".join(f"{name:>14}" for name in case["overlap"][0]))
    for row in case["overlap"]:
        cells = []
        for value in row.values():
            cells.append(f"{value:14.3f}" if isinstance(value, float) else f"{value:>14}")
        print("".join(cells))


if __name__ == "__main__":
    with reporting_errors():
        main()
