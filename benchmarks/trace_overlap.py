"""A ring of ranks on one GPU: do its messages travel under its kernels, and does the host wait for anything in a hop?

    python -m benchmarks.trace_overlap --json trace-overlap.json --traces runs/traces
    python -m benchmarks.trace_overlap --ranks 4 --tokens 4096 --layout zigzag --kernels triton

Needs torch, and Triton for its kernel; nothing else, and no network. The package's own ring runs in one process, each
rank with a thread and two streams (streamed_ring.py); messages are copies within the GPU. By kernel and mask:

- right: the results are those of the same hops one after the other on one stream, within rounding. A race would show.
- host waits: with torch.cuda.set_sync_debug_mode("error"), on masks that no rank has on the device yet, the line of a
  hop that makes the host wait; none is what should be there.
- of each rank, forward and backward, from the profiler's trace: its messages, the milliseconds that they took, and the
  share of these under kernels of its own and of any rank. With --traces the traces are kept, for Chrome and Perfetto.

The exit code is 0 only if all is right and nothing waits. On a CPU the same runs without streams, and is not traced.
The ranks share one GPU: what kernels and copies take from each other there, ranks with a GPU each would not.
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
from benchmarks.common import DTYPES, write_json
from benchmarks.device_trace import Overlap, overlaps
from benchmarks.document_packs import random_starts
from benchmarks.streamed_ring import StreamExchange, Streams, on_every_rank
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.errors import ConfigError, KernelUnavailable, not_positive, reporting_errors
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose
from megatron_ring.kernels.attention.accuracy import TOLERANCE, error
from megatron_ring.kernels.attention.support import Feature

T = TypeVar("T")


def main() -> None:
    asked = _parser().parse_args()
    _check(asked)
    device = torch.cuda.get_device_name() if asked.device == "cuda" else asked.device
    print(f"{device}, torch {torch.__version__}, {asked.ranks} ranks of {asked.tokens} tokens, {asked.layout}, "
          f"{asked.heads} heads of {asked.head_dim}, {asked.kv_heads} key-value heads, {asked.dtype}")  # fmt: skip
    traces = Path(asked.traces) if asked.traces else None
    cases = (
        Case.of(asked, kernel, mask)
        for kernel in _kernels(asked)
        for mask in ("causal", "documents")
    )
    found = [_told(case.examined(traces)) for case in cases]
    about = {"device": device, "torch": torch.__version__, "asked": vars(asked), "found": found}
    write_json(asked.json, about)
    raise SystemExit(any(case["host_waits"] or not case["right"] for case in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank")
    parser.add_argument("--layout", choices=["ring", "striped", "zigzag"], default="striped")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--mean-document", type=int, default=4096, help="tokens of a packed document"
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=[],
        help="by default all that can do it here",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--traces", default="", help="a folder to keep the traces in")
    parser.add_argument("--json", default="", help="write the results to this file too")
    return parser


def _check(asked: argparse.Namespace) -> None:
    wrong = not_positive(asked, "tokens", "heads", "kv_heads", "head_dim", "mean_document")
    if not wrong and asked.heads % asked.kv_heads:
        wrong.append(
            f"heads {asked.heads} must be a multiple of kv_heads {asked.kv_heads}. Set --heads or --kv-heads."
        )
    if asked.ranks < 2:
        wrong.append(
            f"ranks {asked.ranks} must be at least 2: a ring of one sends nothing. Set --ranks."
        )
    if asked.device == "cuda" and not torch.cuda.is_available():
        wrong.append("torch sees no GPU. Set --device cpu to run without streams and traces.")
    if wrong:
        raise ConfigError(wrong)


def _kernels(asked: argparse.Namespace) -> list[str]:
    """Those asked for; else all that take such tensors and masks here, but for the reference."""

    def can(name: str) -> bool:
        try:
            return bool(
                choose(name, asked.device, DTYPES[asked.dtype], asked.head_dim, {Feature.DOCUMENTS})
            )
        except KernelUnavailable:
            return False

    return asked.kernels or [name for name in KERNELS if name != "reference" and can(name)]


class Shard(NamedTuple):
    """Of one rank."""

    q: torch.Tensor
    kv: torch.Tensor
    dout: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A ring on the device, by a kernel and a mask that have names. inputs: q, k, v and dout of the whole sequence."""

    names: dict[str, str]
    kernel: HopKernel
    layout: Layout
    mask: Mask
    inputs: list[torch.Tensor]
    streams: list[Streams]

    @staticmethod
    def of(asked: argparse.Namespace, kernel: str, mask: str) -> "Case":
        length = asked.ranks * asked.tokens
        masks = {
            "causal": CAUSAL,
            "documents": Mask(document_starts=random_starts(asked.mean_document, length)),
        }
        generator = torch.Generator(asked.device).manual_seed(0)
        shapes = [
            (1, length, n, asked.head_dim)
            for n in (asked.heads, asked.kv_heads, asked.kv_heads, asked.heads)
        ]
        inputs = [torch.randn(shape, generator=generator, device=asked.device) for shape in shapes]
        return Case(
            names={"kernel": kernel, "mask": mask},
            kernel=KERNELS[kernel],
            layout=Layout(asked.layout, length, asked.ranks),
            mask=masks[mask],
            inputs=[x.to(DTYPES[asked.dtype]) for x in inputs],
            streams=[Streams.of_device(asked.device) for _ in range(asked.ranks)],
        )

    @property
    def on_gpu(self) -> bool:
        return self.inputs[0].is_cuda

    def examined(self, traces: Path | None) -> dict[str, Any]:
        shards = [self._shard(rank) for rank in range(self.layout.ring_size)]
        # Before the streams: kernels are compiled, and what streams share is on the device when they begin.
        expected = self._done(
            emulated_ring.attention(self.inputs, self.layout, self.kernel, self.mask)
        )
        forwards = self._done(self._forward(shards))
        backwards = self._done(self._backward(shards, forwards))
        found = self.names | {"right": self._right(forwards, backwards, expected)}
        if not self.on_gpu:
            return found | {"host_waits": None, "overlap": []}
        acts = {
            "forward": lambda: self._forward(shards),
            "backward": lambda: self._backward(shards, forwards),
        }
        self.mask.runs.clear()  # so that every hop has runs to copy to the device
        waits = [line for act in acts.values() if (line := _where_the_host_waits(act))]
        rows = [
            row for direction, act in acts.items() for row in self._overlap(direction, act, traces)
        ]
        return found | {"host_waits": waits, "overlap": rows}

    def _shard(self, rank: int) -> Shard:
        q, k, v, dout = (self._rows(x, rank) for x in self.inputs)
        return Shard(q, torch.stack([k, v]), dout)

    def _rows(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        return whole[:, self.layout.positions(rank).to(whole.device)]

    def _forward(self, shards: list[Shard]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        def of_rank(rank: int, exchange: StreamExchange) -> tuple[torch.Tensor, torch.Tensor]:
            return ring_loop.forward(shards[rank].q, shards[rank].kv, self._ring(rank, exchange))

        return on_every_rank(self.streams, of_rank)

    def _backward(
        self, shards: list[Shard], forwards: list
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        def of_rank(rank: int, exchange: StreamExchange) -> tuple[torch.Tensor, torch.Tensor]:
            q, kv, dout = shards[rank]
            return ring_loop.backward(
                dout, None, q, kv, *forwards[rank], self._ring(rank, exchange)
            )

        return on_every_rank(self.streams, of_rank)

    def _ring(self, rank: int, exchange: StreamExchange) -> ring_loop.Ring:
        scale = self.inputs[0].shape[-1] ** -0.5
        return ring_loop.Ring(self.layout, rank, self.kernel, scale, exchange, self.mask)

    def _done(self, results: T) -> T:
        """What was left to the device, once it is there for every stream."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return results

    def _right(self, forwards: list, backwards: list, expected: emulated_ring.Attention) -> bool:
        def of_rank(rank: int) -> bool:
            (out, _), (dq, (dk, dv)) = forwards[rank], backwards[rank]
            pairs = zip((out, dq, dk, dv), (self._rows(x, rank) for x in expected))
            return all(error(x, y) <= TOLERANCE[self.inputs[0].dtype] for x, y in pairs)

        return all(of_rank(rank) for rank in range(self.layout.ring_size))

    def _overlap(
        self, direction: str, act: Callable[[], object], traces: Path | None
    ) -> list[dict[str, Any]]:
        """A row for each rank."""
        with tempfile.TemporaryDirectory() as passing:
            path = (traces or Path(passing)) / f"{'-'.join([*self.names.values(), direction])}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            of_ranks = self._traced(act, path)
        return [
            {"direction": direction, "rank": rank} | _row(each)
            for rank, each in enumerate(of_ranks)
        ]

    def _traced(self, act: Callable[[], object], path: Path) -> list[Overlap]:
        roll_call = [(2 * rank + 1, 2 * rank + 2) for rank in range(self.layout.ring_size)]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            act()
            self._call_the_roll(roll_call)
        recorded.export_chrome_trace(str(path))
        return overlaps(json.loads(path.read_text())["traceEvents"], roll_call)

    def _call_the_roll(self, roll_call: list[tuple[int, int]]) -> None:
        here, there = (
            self.inputs[0].new_zeros(2 * len(roll_call), dtype=torch.uint8) for _ in range(2)
        )
        torch.cuda.synchronize()
        for own, sizes in zip(self.streams, roll_call):
            for stream, size in zip((own.hops, own.messages), sizes):
                with own.on(stream):
                    there[:size].copy_(here[:size])
        torch.cuda.synchronize()  # before the profile ends


def _where_the_host_waits(act: Callable[[], object]) -> str:
    """The line of the package at which the host first waits for the device; "" where it does nowhere."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        act()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if "megatron_ring" in frame.filename] or frames)[-1]
        return f"{last.filename}:{last.lineno}: {last.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return ""


def _row(found: Overlap) -> dict[str, Any]:
    shares = {"under_own": found.under_own, "under_any": found.under_any}
    of_travelled = {
        name: under / found.travelled if found.travelled else 0.0 for name, under in shares.items()
    }
    milliseconds = {"travelled_ms": found.travelled / 1e3, "kernels_ms": found.kernels / 1e3}
    return {"messages": found.messages} | milliseconds | of_travelled


def _told(case: dict[str, Any]) -> dict[str, Any]:
    waits = case["host_waits"]
    said = "not asked, there is no device" if waits is None else "; ".join(waits) or "none"
    right = "right" if case["right"] else "WRONG"
    print(f"\n{case['kernel']}, {case['mask']}: {right}; host waits: {said}", flush=True)
    for number, row in enumerate(case["overlap"]):
        if number == 0:
            print("".join(f"{name:>14}" for name in row))
        print(
            "".join(
                f"{value:14.3f}" if isinstance(value, float) else f"{value:>14}"
                for value in row.values()
            )
        )
    return case


if __name__ == "__main__":
    with reporting_errors():
        main()
