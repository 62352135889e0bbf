"""Time ring attention in every layout, forward and backward, against a single process.

    python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 \\
        --heads 8 --kv-heads 8 --head-dim 64 --json F
    python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 --documents 2000
    python -m benchmarks.bench_attention --emulate-ranks 16 --seq-length 16384

--nproc N starts N real ranks (NCCL on CUDA; otherwise gloo, with one thread per rank). The single
process holds the whole sequence, has N threads and runs torch's causal attention. The runs of each
round are interleaved and medians over the rounds are reported, so that a drift of the machine's
speed affects all of them alike.

With real ranks the baseline is the published ring, in which keys and values travel in the backward
pass too. Where queries are fewer bytes our ring sends those instead (row "lighter"). The rank that
idles in its forward pass is then the busy one in its backward pass, so a contiguous ring is less
unbalanced and striping gains less over it.

--documents and --window apply the same mask to all runs; document lengths are lognormal and the
same on every rank. The single process then runs torch's causal attention on one document after
another or, with --window, which torch's public function does not support, the ring's kernel. With
real ranks the striped ring without that mask is timed as well (row "dense"), to compare the cost
per visible pair. With documents the striped ring that places them by size is timed too (row
"placed"), and where documents end with the shards of a contiguous ring, ranks that attend to their
own documents without a ring (row "apart").

--emulate-ranks N runs the hops of all ranks one after another in one process. The critical path is
the time that a ring of N such devices with free communication would take. The kernel is timed,
forward and backward, in every hop with visible pairs, on a CPU in CPU seconds. Not timed: building
the mask of a hop and its tiles, which a model does once per batch for all of its layers.
"""

import functools
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from benchmarks.common import (
    DTYPES,
    Column,
    check_outputs,
    device_name,
    legend,
    plain_row,
    plain_titles,
    size_problems,
    write_json,
)
from benchmarks.document_histogram import pack_starts
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.hop_cost import queries_are_lighter
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout, auto_stripe_size
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_key_ranges
from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.errors import ConfigError, counted, flag, reporting_errors
from megatron_ring.kernels.attention import (
    KERNELS,
    GradientAccumulators,
    HopInputs,
    choose,
    stack_to_kernel_layout,
    stripe_widths,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.kernels.attention.registry import Feature
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.environment import free_port, keep_freed_memory
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.ring_timeline import Timeline, bound_over_ring, visible_pairs_per_hop

LAYOUTS = ("ring", "striped", "zigzag")
# Rows of further runs: the striped ring without the mask, the ring that sends queries, the one that
# places documents, and ranks without a ring.
DENSE = "dense"
LIGHTER = "lighter"
PLACED = "placed"
APART = "apart"


@dataclass(frozen=True)
class Options:
    nproc: int = 2
    """Ranks of the ring, one process each."""
    emulate_ranks: int = 0
    """Run the hops of this many ranks one after another in one process instead."""
    seq_length: int = 16384
    """Tokens of the whole sequence."""
    documents: str = "0"
    """Lengths in tokens of the documents packed into the sequence: a mean, for lognormal lengths;
    equal:LENGTH; histogram:FILE, drawn from a table, or histogram for the published one
    (document_lengths.csv). 0: a single document."""
    window: int = 0
    """Keys that a token attends to, itself included; 0: all earlier ones."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Head dim."""
    batch: int = 1
    """Sequences in the batch."""
    stripe_size: int | Literal["auto"] = "auto"
    """Tokens per stripe of the striped layout; auto: the size that training would choose."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the tensors."""
    attention_kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """Kernel that computes a hop."""
    rounds: int = 5
    """Timed rounds, after one warm-up round (with --emulate-ranks: one warm-up hop).
    0: count the work and time nothing."""
    json: str = ""
    """Also write the results to this file."""

    @property
    def has_documents(self) -> bool:
        """Whether the sequence is a pack of documents."""
        return self.documents != "0"


@dataclass(frozen=True)
class Case:
    """A ring to measure: a layout under a mask."""

    layout: Layout
    mask: Mask

    @functools.cached_property
    def count(self) -> Timeline:
        return visible_pairs_per_hop(self.layout, self.mask)


@dataclass(frozen=True)
class Times:
    """Measured times; both dicts are empty if nothing was timed.

    Attributes:
        seconds: Seconds by the name of the case, and of the single process as "single".
        hops: Seconds of every hop by the name of the case; emulated ranks only.
    """

    seconds: dict[str, float]
    hops: dict[str, Timeline]


@dataclass(frozen=True)
class Result:
    """One row of the table; None where nothing was timed or there is nothing to compare with.

    Attributes:
        bound: Upper bound of ``speedup_over_ring``.
        efficiency: Time of the single process over the time of the ring.
        cost_per_pair_over_dense: Time per visible pair, relative to the striped ring without
            documents and window.
    """

    layout: str
    stripe_size: int
    seconds: float | None
    speedup_over_ring: float | None
    bound: float
    efficiency: float | None
    imbalance_counted: float
    imbalance_timed: float | None
    cost_per_pair_over_dense: float | None


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json)
    _check(options)
    cases = _cases(options)
    times = _measure(options, cases)
    findings = _findings(options, cases, times)
    _print_report(findings)
    write_json(options.json, findings)


def _check(options: Options) -> None:
    problems = size_problems(options, "nproc", "seq_length", "head_dim", "batch")
    for name in ("emulate_ranks", "window", "rounds"):
        value = getattr(options, name)
        if value < 0:
            problems.append(f"{name} {value} must be at least 0. Set {flag(name)}.")
    if problems:
        raise ConfigError(problems)
    _mask(options)


# ---- the cases that the options select ----


def _cases(options: Options) -> dict[str, Case]:
    """Return a case per layout, plus the striped ring without the mask as a reference."""
    mask = _mask(options)
    cases = {name: Case(_layout(name, options, mask), mask) for name in LAYOUTS}
    # Left out for emulated ranks: their sequences are long and take hours without documents.
    if mask.document_starts:
        layout = _layout("striped", options, mask)
        layout = replace(layout, placement=DocumentPlacement(options.window))
        placements = place_samples(torch.tensor(mask.document_starts), options.batch, layout)
        cases[PLACED] = Case(layout, replace(mask, placements=placements))
    if mask != CAUSAL and not options.emulate_ranks:
        cases[DENSE] = Case(_layout("striped", options, CAUSAL), CAUSAL)
    return cases


def _mask(options: Options) -> Mask:
    if not options.has_documents:
        return Mask(options.window)
    starts = pack_starts(options.documents, options.seq_length, options.batch)
    return Mask(options.window, starts, options.batch)


def _layout(name: str, options: Options, mask: Mask) -> Layout:
    stripe = stripe_size(options, mask) if name == "striped" else 1
    return Layout(name, options.seq_length, _ring_size(options), stripe)


def stripe_size(options: Options, mask: Mask) -> int:
    """Return --stripe-size as a number of tokens, with "auto" resolved."""
    if options.stripe_size != "auto":
        return options.stripe_size
    packed = bool(mask.document_starts)
    kind = MaskKind.SPARSE if packed or mask.window else MaskKind.CAUSAL
    widths = stripe_widths(_kernel(options), _device_type(options), kind).widths
    return auto_stripe_size(options.seq_length, _ring_size(options), widths, packed, mask.window)


def _ring_size(options: Options) -> int:
    return options.emulate_ranks or options.nproc


def _device_type(options: Options) -> str:
    processes = 1 if options.emulate_ranks else options.nproc
    return "cuda" if torch.cuda.device_count() >= processes else "cpu"


def _kernel(options: Options) -> str:
    features = {
        Feature.DOCUMENTS: options.has_documents,
        Feature.WINDOW: options.window > 0,
        Feature.GROUPED_HEADS: options.heads != options.kv_heads,
    }
    required = [feature for feature, is_required in features.items() if is_required]
    dtype = DTYPES[options.dtype]
    device = _device_type(options)
    return choose(options.attention_kernel, device, dtype, options.head_dim, required).name


def _tensors(options: Options, tokens: int, samples_end_to_end: int = 1) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the output, each (batch, tokens, heads, head dim)."""
    batch = options.batch // samples_end_to_end
    tokens = samples_end_to_end * tokens
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    device = _device_type(options)
    dtype = DTYPES[options.dtype]
    return [
        torch.randn(batch, tokens, h, options.head_dim, device=device, dtype=dtype) for h in heads
    ]


# ---- results ----


def _findings(options: Options, cases: dict[str, Case], times: Times) -> dict:
    if options.emulate_ranks:
        setting = f"{counted(options.emulate_ranks, 'emulated rank')}, communication not counted"
    else:
        setting = counted(options.nproc, "rank")
    one_by_one = ", document by document" if options.has_documents else ""
    single = "the ring's kernel" if options.window else f"torch's causal attention{one_by_one}"
    dense = cases.get(DENSE)
    return {
        "setting": setting,
        "device": device_name(_device_type(options)),
        "emulated": bool(options.emulate_ranks),
        "options": vars(options),
        "documents": options.documents,
        "document_count": len(cases["ring"].mask.document_starts) or options.batch,
        "window": options.window,
        "visible_pairs": _visible_pairs(cases["ring"], options.batch),
        "single": single,
        "single_seconds": times.seconds.get("single"),
        "dense_stripe_size": dense.layout.stripe_size if dense else None,
        "dense_seconds": times.seconds.get(DENSE),
        "lighter_seconds": times.seconds.get(LIGHTER),
        "apart_seconds": times.seconds.get(APART),
        "results": [
            vars(_result(name, cases, times, options.batch)) for name in cases if name != DENSE
        ],
    }


def _result(name: str, cases: dict[str, Case], times: Times, batch: int) -> Result:
    case = cases[name]
    seconds = times.seconds.get(name)
    seconds_per_pair = {
        timed: times.seconds[timed] / _visible_pairs(cases[timed], batch)
        for timed in times.seconds
        if timed in cases
    }
    return Result(
        layout=name,
        stripe_size=case.layout.stripe_size,
        seconds=seconds,
        speedup_over_ring=_ratio(times.seconds.get("ring"), seconds),
        bound=_bound(name, cases),
        efficiency=_ratio(times.seconds.get("single"), seconds),
        imbalance_counted=case.count.imbalance,
        imbalance_timed=times.hops[name].imbalance if times.hops else None,
        cost_per_pair_over_dense=_ratio(seconds_per_pair.get(name), seconds_per_pair.get(DENSE)),
    )


def _visible_pairs(case: Case, batch: int) -> int:
    """Return the visible pairs of one head in the whole batch.

    The mask of a case may cover one sample or all of them.
    """
    return int(case.count.work_RR.sum()) * (batch // case.mask.samples)


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def _bound(name: str, cases: dict[str, Case]) -> float:
    if name == "ring" or cases[name].mask == CAUSAL:
        return bound_over_ring(name, cases[name].layout.ring_size)
    return cases["ring"].count.gain_of_balance


# By field of Result.
_COLUMNS = {
    "stripe_size": Column("stripe", 8, 0, "stripe size in tokens"),
    "seconds": Column(
        "seconds", 10, 4, "forward and backward; of emulated ranks, the critical path"
    ),
    "speedup_over_ring": Column(
        "over ring", 11, 3, "seconds of the row ring over those of this row"
    ),
    "bound": Column("bound", 8, 3, "the most that 'over ring' can be, from balance alone"),
    "efficiency": Column(
        "efficiency", 12, 3, "seconds of the row single over those of this row; 1 is ideal"
    ),
    "imbalance_counted": Column(
        "slowest/mean", 14, 4, "visible pairs of the slowest rank over the mean"
    ),
    "imbalance_timed": Column(
        "timed", 8, 3, "slowest/mean in seconds instead of pairs; emulated ranks only"
    ),
    "cost_per_pair_over_dense": Column(
        "pair/dense", 12, 3, "seconds per visible pair over those of the row dense"
    ),
}
# The rows that are no layout of the ring, besides single, and what the others compare with.
_ROWS = {
    DENSE: "the striped ring without the mask of documents or window",
    LIGHTER: "the contiguous ring that sends queries backward where they are fewer bytes",
    APART: "ranks that attend to documents of their own, without a ring",
    PLACED: "the striped ring whose documents are placed by size",
    "ring": "the contiguous ring as published, whose keys and values travel in both directions",
}


def _print_report(findings: dict) -> None:
    options = findings["options"]
    rounds = (
        f"median of {counted(options['rounds'], 'round')}"
        if options["rounds"]
        else "counted, not timed"
    )
    print(
        f"{findings['device']}, {options['dtype']}, {findings['setting']}, "
        f"{options['seq_length']} tokens, forward + backward, {rounds}"
    )
    if options["documents"] != "0" or options["window"]:
        print(_mask_line(findings))
    print(f"single: {findings['single']}")
    print(f"{'layout':<10}{plain_titles(_COLUMNS)}")
    single = {"layout": "single", "seconds": findings["single_seconds"], "efficiency": 1.0}
    dense = {
        "layout": DENSE,
        "seconds": findings["dense_seconds"],
        "stripe_size": findings["dense_stripe_size"],
    }
    lighter = {"layout": LIGHTER, "seconds": findings["lighter_seconds"], "stripe_size": 1}
    apart = {"layout": APART, "seconds": findings["apart_seconds"]}
    for row in (single, dense, lighter, apart):
        if row["seconds"]:
            print(_line(row))
    for row in findings["results"]:
        print(_line(row))
    print(legend(_COLUMNS))
    for row, meaning in _ROWS.items():
        print(f"  {row}: {meaning}")


def _mask_line(findings: dict) -> str:
    documents = "no documents"
    if findings["documents"] != "0":
        count = findings["document_count"]
        documents = f"{counted(count, 'document')} (--documents {findings['documents']})"
    window = f"a window of {findings['window']}" if findings["window"] else "no window"
    return f"{documents}; {window}; {findings['visible_pairs']:,} visible pairs"


def _line(row: dict) -> str:
    return f"{row['layout']:<10}{plain_row(_COLUMNS, row)}"


# ---- real ranks ----


def _measure(options: Options, cases: dict[str, Case]) -> Times:
    if options.rounds == 0:
        return Times({}, {})
    if options.emulate_ranks:
        return _emulate(options, cases)
    return Times(_spawn(options), {})


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
    on_cuda = _device_type(options) == "cuda"
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
    runs = _runs(rank, options)
    seconds = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        # The order changes each round: a run inherits caches, heap and heat from the previous one.
        for name in random.Random(turn).sample(list(runs), len(runs)):
            seconds[name].append(_seconds_on_all_ranks(runs[name]))
    if rank == 0:
        results.put({name: statistics.median(times[1:]) for name, times in seconds.items()})
    dist.barrier()
    dist.destroy_process_group()


def _runs(rank: int, options: Options) -> dict[str, Callable[[], None]]:
    """Return the runs to time by name; every rank has the same names."""
    groups = ProcessGroups.build(Grid(ring=options.nproc), rank)
    cases = _cases(options)
    runs = {name: _ring_run(case, groups, options) for name, case in cases.items()}
    if options.nproc > 1 and _sends_queries(options):
        runs[LIGHTER] = runs["ring"]
        runs["ring"] = _published_run(cases["ring"], groups, options)
    if _documents_end_with_shards(cases["ring"]):
        runs[APART] = _apart_run(rank, cases["ring"], options)
    runs["single"] = _single_run(options, options.nproc) if rank == 0 else lambda: None
    return runs


def _ring_run(case: Case, groups: ProcessGroups, options: Options) -> Callable[[], None]:
    attention = ContextParallelAttention(case.layout, _kernel(options), groups)
    *qkv, dout = _tensors(options, case.layout.shard_length)
    inputs = [x.requires_grad_() for x in qkv]
    starts = torch.tensor(case.mask.document_starts) if case.mask.document_starts else None

    def run() -> None:
        out, _ = attention(*inputs, case.mask.window, starts)
        torch.autograd.grad(out, inputs, dout)

    return run


def _documents_end_with_shards(case: Case) -> bool:
    """Return whether no document is on two ranks of a contiguous ring."""
    starts = case.mask.document_starts
    tokens = case.mask.samples * case.layout.seq_length
    return set(range(0, tokens, case.layout.shard_length)) <= set(starts)


def _apart_run(rank: int, case: Case, options: Options) -> Callable[[], None]:
    """Return a run in which each rank attends to the documents of its contiguous shard alone."""
    length = case.layout.shard_length
    first = rank * length
    starts = [
        start - first for start in case.mask.document_starts if first <= start < first + length
    ]
    alone = Case(Layout("none", length, 1), Mask(options.window, tuple(starts)))
    return _ring_run(alone, ProcessGroups(), options)


def _sends_queries(options: Options) -> bool:
    """Return whether our ring sends queries in the backward pass with these heads."""
    q, k, v, _ = _tensors(options, tokens=1)
    return queries_are_lighter(q, torch.stack([k, v]))


def _published_run(case: Case, groups: ProcessGroups, options: Options) -> Callable[[], None]:
    """Return a run of Ring Attention as published (Liu et al. 2023, section 3).

    Keys and values travel in the backward pass as they do in the forward pass, all of them to all
    ranks.
    """
    q, k, v, dout = _tensors(options, case.layout.shard_length, case.mask.samples)
    exchange = RingExchange.over(groups.ring_links)
    kernel = _kernel(options)
    ring = ring_loop.Ring(
        case.layout,
        exchange.ring_rank,
        KERNELS[kernel],
        options.head_dim**-0.5,
        exchange,
        case.mask,
        sends_queries=lambda q, kv: False,
        splits_own_work=exchange.is_slow,
        sends_all_rows=True,
    )

    def run() -> None:
        local_q = to_kernel_layout(kernel, q)
        kv = stack_to_kernel_layout(kernel, [k, v])
        out, lse = ring_loop.forward(local_q, kv, ring)
        ring_loop.backward(dout, None, local_q, kv, out, lse, ring)

    return run


def _single_run(options: Options, threads: int) -> Callable[[], None]:
    """Return a run of one process on the whole sequence, without a ring.

    It uses torch's public function, or the ring's kernel where there is a window.
    """
    mask = _mask(options)
    whole = Case(Layout("none", options.seq_length, 1), mask)
    run = _ring_run(whole, ProcessGroups(), options) if mask.window else _torch_run(mask, options)

    def with_threads() -> None:
        torch.set_num_threads(threads)
        run()
        torch.set_num_threads(1)

    return with_threads


def _torch_run(mask: Mask, options: Options) -> Callable[[], None]:
    tensors = _tensors(options, options.seq_length, mask.samples)
    *inputs, dout = (x.transpose(1, 2) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    bounds = torch.tensor([*(mask.document_starts or (0,)), dout.shape[2]])
    lengths = bounds.diff().tolist()
    grouped = options.heads != options.kv_heads

    def run() -> None:
        documents = zip(*(x.split(lengths, dim=2) for x in inputs))
        outs = [
            F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=grouped)
            for qkv in documents
        ]
        torch.autograd.grad(outs, inputs, dout.split(lengths, dim=2))

    return run


def _seconds_on_all_ranks(run: Callable[[], None]) -> float:
    """Return the seconds of ``run`` from a common start until the last rank ends; blocks."""
    dist.barrier()
    seconds = _seconds(run)
    slowest = torch.tensor(seconds, device="cuda" if torch.cuda.is_initialized() else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _seconds(run: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    _synchronize()
    start = clock()
    run()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    """Wait for work queued on the GPU; on a CPU there is none."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- emulated ranks ----


def _seconds_in_one_process(run: Callable[[], None]) -> float:
    """Return the seconds of a run without communication.

    On a CPU these are CPU seconds, so that other load on the machine does not count.
    """
    return _seconds(run, time.perf_counter if torch.cuda.is_initialized() else time.process_time)


def _emulate(options: Options, cases: dict[str, Case]) -> Times:
    """Return each layout's critical path and hop times.

    The time of the single process is divided by the number of ranks.
    """
    torch.set_num_threads(1)
    single = _single_run(options, threads=1)
    time_hop = _hop_timer(options, cases["ring"])
    single_seconds = []
    work = []
    for _ in range(options.rounds):
        single_seconds.append(_seconds_in_one_process(single))
        work.append(_emulated_round(time_hop, cases))
    hops = {}
    for name in cases:
        of_rounds = torch.stack([of_round[name] for of_round in work])
        hops[name] = Timeline(of_rounds.median(dim=0).values)
    seconds = {name: timeline.critical_path for name, timeline in hops.items()}
    seconds["single"] = statistics.median(single_seconds) / options.emulate_ranks
    return Times(seconds, hops)


def _emulated_round(
    time_hop: Callable[[KeyRanges], float], cases: dict[str, Case]
) -> dict[str, torch.Tensor]:
    """Return the seconds of every hop and rank, (R, R), by layout.

    The layouts are interleaved. A hop without visible pairs takes no time.
    """
    work = {name: torch.zeros_like(case.count.work_RR) for name, case in cases.items()}
    ring_size = cases["ring"].layout.ring_size
    ranks = range(ring_size)
    for hop, rank, (name, case) in itertools.product(ranks, ranks, cases.items()):
        if case.count.work_RR[hop, rank]:
            key_ranges = hop_key_ranges(case.layout, rank, (rank - hop) % ring_size, case.mask)
            work[name][hop, rank] = time_hop(key_ranges)
    return work


def _hop_timer(options: Options, case: Case) -> Callable[[KeyRanges], float]:
    """Return a function that times one hop, given its key ranges.

    It runs the kernel's forward and backward as the ring calls them. All hops use the same tensors
    of one shard and continue one running softmax. This starts with the first hop of ``case``, in
    which every query sees itself.
    """
    name = _kernel(options)
    kernel = KERNELS[name]
    scale = options.head_dim**-0.5
    *qkv, dout = _tensors(options, case.layout.shard_length, case.mask.samples)
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
        return _seconds_in_one_process(functools.partial(run_hop, key_ranges))

    seconds(hop_key_ranges(case.layout, 0, 0, case.mask))
    return seconds


if __name__ == "__main__":
    with reporting_errors():
        main()
