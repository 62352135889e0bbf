"""Times of bench_attention's runs on real ranks, or of the hops of emulated ranks."""

import functools
import itertools
import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.attention_cases import Case, Options
from benchmarks.attention_runs import SINGLE, Run, attention_inputs, runs_of_rank, single_run
from benchmarks.common import compute_seconds, elapsed_seconds
from megatron_ring.context_parallel.mask import hop_key_ranges
from megatron_ring.kernels.attention import (
    KERNELS,
    GradientAccumulators,
    HopInputs,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax
from megatron_ring.parallel.environment import free_port, keep_freed_memory
from megatron_ring.plan.ring_timeline import Timeline


@dataclass(frozen=True)
class Times:
    """Measured times; both dicts are empty if nothing was timed.

    Attributes:
        seconds: Seconds by the name of the case or of another row of attention_runs.py. Of emulated
            ranks the time in lockstep, and of SINGLE that of the process over the ranks.
        hops: Seconds of every hop by the name of the case; emulated ranks only.
    """

    seconds: dict[str, float]
    hops: dict[str, Timeline]


def measure(options: Options, cases: dict[str, Case]) -> Times:
    """Time the runs on real ranks, or the hops of emulated ones; nothing for 0 rounds. Blocks."""
    if options.rounds == 0:
        return Times({}, {})
    if options.emulate_ranks:
        return _emulate(options, cases)
    return Times(_spawn(options), {})


# ---- real ranks ----


def _spawn(options: Options) -> dict[str, float]:
    port = free_port()
    if options.has_documents or options.window:
        # Idle OpenMP threads spin between many short operators and delay others on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_run_rank, args=(options, port, results), nprocs=options.nproc)
    return results.get()


def _run_rank(rank: int, options: Options, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_cuda = options.device_type == "cuda"
    if on_cuda:
        torch.cuda.set_device(rank)
    else:
        keep_freed_memory()  # as in training
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        rank=rank,
        world_size=options.nproc,
        device_id=torch.device("cuda", rank) if on_cuda and options.nproc > 1 else None,
    )
    torch.set_num_threads(1)
    runs = runs_of_rank(rank, options)
    seconds = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        # The order changes each round: a run inherits caches, heap and heat from the previous one.
        for name in random.Random(turn).sample(list(runs), len(runs)):
            seconds[name].append(seconds_on_all_ranks(runs[name], options.device_type))
    if rank == 0:
        results.put({name: statistics.median(times[1:]) for name, times in seconds.items()})
    dist.barrier()
    dist.destroy_process_group()


def seconds_on_all_ranks(run: Run, device: str) -> float:
    """Return the seconds of ``run`` from a common start until the last rank ends; blocks."""
    dist.barrier()
    slowest = torch.tensor(elapsed_seconds(run, device), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


# ---- emulated ranks ----


def _emulate(options: Options, cases: dict[str, Case]) -> Times:
    """Return each layout's time in lockstep and hop times.

    The time of the single process is divided by the number of ranks.
    """
    torch.set_num_threads(1)
    single = single_run(options, threads=1)
    time_hop = _hop_timer(options, cases["ring"])
    single_seconds = []
    work = []
    for _ in range(options.rounds):
        single_seconds.append(compute_seconds(single, options.device_type))
        work.append(_emulated_round(time_hop, cases))
    hops = {}
    for name in cases:
        of_rounds = torch.stack([of_round[name] for of_round in work])
        hops[name] = Timeline(of_rounds.median(dim=0).values)
    seconds = {name: timeline.lockstep_time for name, timeline in hops.items()}
    seconds[SINGLE] = statistics.median(single_seconds) / options.emulate_ranks
    return Times(seconds, hops)


def _emulated_round(
    time_hop: Callable[[KeyRanges], float], cases: dict[str, Case]
) -> dict[str, torch.Tensor]:
    """Return the seconds of every hop and rank, (R, R), by layout.

    The layouts are interleaved. A hop without visible pairs takes no time.
    """
    work = {name: torch.zeros_like(case.pairs_per_hop.work_RR) for name, case in cases.items()}
    ring_size = cases["ring"].layout.ring_size
    ranks = range(ring_size)
    for hop, rank, (name, case) in itertools.product(ranks, ranks, cases.items()):
        if case.pairs_per_hop.work_RR[hop, rank]:
            source = case.keys_of_hop(rank, hop)
            key_ranges = hop_key_ranges(case.layout, rank, source, case.mask)
            work[name][hop, rank] = time_hop(key_ranges)
    return work


def _hop_timer(options: Options, case: Case) -> Callable[[KeyRanges], float]:
    """Return a function that times one hop, given its key ranges.

    It runs the kernel's forward and backward as the ring calls them. All hops use the same tensors
    of one shard and continue one running softmax. This starts with the first hop of ``case``, in
    which every query sees itself.
    """
    name = options.kernel
    kernel = KERNELS[name]
    scale = options.head_dim**-0.5
    *qkv, dout = attention_inputs(options, case.layout.shard_length, case.mask.samples)
    q, k, v = (to_kernel_layout(name, x) for x in qkv)
    state = RunningSoftmax.empty(q)
    accumulators = GradientAccumulators(
        *(torch.zeros_like(x, dtype=state.out_BLHD.dtype) for x in (q, k, v))
    )

    def run_hop(key_ranges: KeyRanges) -> None:
        inputs = HopInputs(q, k, v, key_ranges, scale)
        kernel.forward(inputs, state)
        out = state.out_BLHD.to(q.dtype)
        kernel.backward(inputs, dout, out, state.lse_BHL, accumulators)

    def seconds(key_ranges: KeyRanges) -> float:
        # One thin head, to build and cache the tiles of this hop at little cost.
        thin = [x[:1, :, :1, :8] for x in (q, k, v)]
        kernel.forward(HopInputs(*thin, key_ranges, scale), RunningSoftmax.empty(thin[0]))
        return compute_seconds(functools.partial(run_hop, key_ranges), options.device_type)

    seconds(hop_key_ranges(case.layout, 0, 0, case.mask))
    return seconds
