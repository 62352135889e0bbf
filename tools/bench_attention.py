"""Time the ring under every layout, forward and backward, beside one process that holds the whole sequence.

    python tools/bench_attention.py --nproc 2 --seq-length 16384 --heads 8 --kv-heads 8 --head-dim 64 --json F
    python tools/bench_attention.py --emulate-ranks 16 --seq-length 16384

With --nproc N there are N real ranks (NCCL on CUDA, else gloo with one thread each); the single process has N threads
and runs torch's causal attention. All take turns within each round, and medians over the rounds are reported, so that
a drift of the machine meets all alike. With --emulate-ranks N one process runs every rank's hops one after the other,
and the critical path is what a ring of N such devices with free communication would take.
"""

import functools
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import hop_runs
from megatron_ring.errors import speaking_errors
from megatron_ring.kernels.attention import KERNELS, choose
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.timeline import Timeline, bound_over_ring, counted

LAYOUTS = ("ring", "striped", "zigzag")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    nproc: int = 2
    """Ranks of the ring, each a process."""
    emulate_ranks: int = 0
    """Run the hops of this many ranks one after the other in one process instead."""
    seq_length: int = 16384
    """Tokens of the whole sequence."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Size of a head."""
    batch: int = 1
    """Sequences."""
    stripe_size: int = 1
    """Neighbouring tokens in a stripe of the striped layout."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the tensors."""
    attention_kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """What computes a hop."""
    rounds: int = 5
    """Timed rounds, after one that warms up."""
    json: str = ""
    """Write the results to this file too."""


@dataclass(frozen=True)
class Result:
    """One row of the table; ``bound`` is on speedup_over_ring, ``efficiency`` is single process over ring."""

    layout: str
    seconds: float
    speedup_over_ring: float
    bound: float
    efficiency: float
    imbalance_counted: float
    imbalance_timed: float | None = None


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    layouts = {name: _layout(name, options) for name in LAYOUTS}
    if options.emulate_ranks:
        seconds, timed = _emulate(options, layouts)
        setting = f"{options.emulate_ranks} emulated ranks, communication not counted"
    else:
        seconds, timed = _spawn(options), {}
        setting = f"{options.nproc} ranks"
    results = [_result(name, layouts[name], seconds, timed) for name in LAYOUTS]
    _report(options, setting, seconds["single"], results)


def _layout(name: str, options: Options) -> Layout:
    ring_size = options.emulate_ranks or options.nproc
    return Layout(name, options.seq_length, ring_size, options.stripe_size if name == "striped" else 1)


def _result(name: str, layout: Layout, seconds: dict[str, float], timed: dict[str, Timeline]) -> Result:
    return Result(
        layout=name,
        seconds=seconds[name],
        speedup_over_ring=seconds["ring"] / seconds[name],
        bound=bound_over_ring(name, layout.ring_size),
        efficiency=seconds["single"] / seconds[name],
        imbalance_counted=counted(layout).imbalance,
        imbalance_timed=timed[name].imbalance if timed else None,
    )


def _report(options: Options, setting: str, single: float, results: list[Result]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {options.dtype}, {setting}, {options.seq_length} tokens, forward + backward, median of "
          f"{options.rounds} rounds")  # fmt: skip
    print(f"{'layout':<10}{'seconds':>10}{'over ring':>11}{'bound':>8}{'efficiency':>12}{'slowest/mean':>14}")
    print(f"{'single':<10}{single:>10.4f}{'':>19}{1:>12.3f}")
    for r in results:
        imbalance = f"{r.imbalance_counted:.4f}" + (f" ({r.imbalance_timed:.3f} timed)" if r.imbalance_timed else "")
        print(f"{r.layout:<10}{r.seconds:>10.4f}{r.speedup_over_ring:>11.3f}{r.bound:>8.3f}{r.efficiency:>12.3f}"
              f"  {imbalance:>12}")  # fmt: skip
    if options.json:
        document = {"setting": setting, "device": device, "emulated": bool(options.emulate_ranks)}
        document |= {"options": vars(options), "single_seconds": single, "results": [vars(r) for r in results]}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n")


def _tensors(options: Options, tokens: int, device: str) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, each (batch, tokens, heads, head size)."""
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    shape = [(options.batch, tokens, h, options.head_dim) for h in heads]
    return [torch.randn(s, device=device, dtype=DTYPES[options.dtype]) for s in shape]


# ---- real ranks ----


def _spawn(options: Options) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, args=(options, port, results), nprocs=options.nproc)
    return results.get()


def _rank(rank: int, options: Options, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_cuda = torch.cuda.device_count() >= options.nproc
    device = f"cuda:{rank}" if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_cuda else "gloo", rank=rank, world_size=options.nproc)
    torch.set_num_threads(1)
    groups = ProcessGroups.build(Grid(ring=options.nproc), rank)
    kernel = choose(options.attention_kernel, device.split(":")[0], DTYPES[options.dtype], options.head_dim).name
    contenders = {name: _ring_run(_layout(name, options), kernel, groups, options, device) for name in LAYOUTS}
    contenders["single"] = _single_run(options, device, options.nproc) if rank == 0 else lambda: None
    seconds = {name: [] for name in contenders}
    for _ in range(options.rounds + 1):
        for name, run in contenders.items():
            seconds[name].append(_together(run, on_cuda))
    if rank == 0:
        results.put({name: statistics.median(times[1:]) for name, times in seconds.items()})
    dist.barrier()
    dist.destroy_process_group()


def _ring_run(layout: Layout, kernel: str, groups: ProcessGroups, options: Options, device: str) -> Callable[[], None]:
    attention = ContextParallelAttention(layout, kernel, groups)
    *qkv, dout = _tensors(options, layout.shard_length, device)
    inputs = [x.requires_grad_() for x in qkv]
    return lambda: torch.autograd.backward(attention(*inputs), dout, inputs=inputs)


def _single_run(options: Options, device: str, threads: int) -> Callable[[], None]:
    *qkv, dout = _tensors(options, options.seq_length, device)
    inputs = [x.transpose(1, 2).requires_grad_() for x in qkv]
    grouped = options.heads != options.kv_heads

    def run() -> None:
        torch.set_num_threads(threads)
        out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=grouped)
        torch.autograd.backward(out, dout.transpose(1, 2), inputs=inputs)
        torch.set_num_threads(1)

    return run


def _together(run: Callable[[], None], on_cuda: bool) -> float:
    """Seconds of ``run`` from a common start to the last rank's end."""
    dist.barrier()
    seconds = _seconds(run, on_cuda)
    slowest = torch.tensor(seconds, device="cuda" if on_cuda else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _seconds(run: Callable[[], None], on_cuda: bool) -> float:
    start = time.perf_counter()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- emulated ranks ----


def _emulate(options: Options, layouts: dict[str, Layout]) -> tuple[dict[str, float], dict[str, Timeline]]:
    """Critical paths by layout beside the single process divided by the number of ranks; and the hops' times."""
    on_cuda = torch.cuda.is_available()
    device = "cuda" if on_cuda else "cpu"
    torch.set_num_threads(1)
    single = _single_run(options, device, threads=1)
    hops = {name: _hop_runs_of(layout, options, device) for name, layout in layouts.items()}
    rounds = [
        [_seconds(single, on_cuda), {name: [_seconds(run, on_cuda) for run in runs] for name, runs in hops.items()}]
        for _ in range(options.rounds + 1)
    ][1:]
    timed = {name: _timeline([hop_seconds[name] for _, hop_seconds in rounds], layouts[name]) for name in hops}
    seconds = {name: timeline.critical_path for name, timeline in timed.items()}
    seconds["single"] = statistics.median(whole for whole, _ in rounds) / options.emulate_ranks
    return seconds, timed


def _timeline(rounds: list[list[float]], layout: Layout) -> Timeline:
    medians = torch.tensor(rounds, dtype=torch.float64).median(dim=0).values
    return Timeline(medians.view(layout.ring_size, layout.ring_size))


def _hop_runs_of(layout: Layout, options: Options, device: str) -> list[Callable[[], None]]:
    """One run for every hop and rank, in that order: the kernel's forward and backward, as the ring calls them."""
    q, k, v, dout = _tensors(options, layout.shard_length, device)
    kernel = KERNELS[choose(options.attention_kernel, device, q.dtype, options.head_dim).name]
    state, scale = RunningSoftmax.empty(q), options.head_dim**-0.5
    kernel.forward(q, k, v, hop_runs(layout, 0, 0), scale, state)
    gradients = [torch.zeros_like(x, dtype=state.out_BLHD.dtype) for x in (q, k, v)]

    def hop(rank: int, source: int) -> None:
        runs = hop_runs(layout, rank, source)
        kernel.forward(q, k, v, runs, scale, state)
        kernel.backward(dout, q, k, v, state.out_BLHD.to(q.dtype), state.lse_BHL, runs, scale, *gradients)

    ranks = range(layout.ring_size)
    return [functools.partial(hop, rank, (rank - step) % layout.ring_size) for step in ranks for rank in ranks]


if __name__ == "__main__":
    with speaking_errors():
        main()
