"""Time the ring under every layout, forward and backward, beside one process that holds the whole sequence.

    python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 --heads 8 --kv-heads 8 --head-dim 64 --json F
    python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 --documents 2000
    python -m benchmarks.bench_attention --emulate-ranks 16 --seq-length 16384

With --nproc N there are N real ranks (NCCL on CUDA, else gloo with one thread each); the single process has N threads
and runs torch's causal attention. All take turns within each round, and medians over the rounds are reported, so that
a drift of the machine meets all alike.

Real ranks are held against the published ring, in which keys travel backward too. Where queries are fewer bytes our own
sends those instead ("lighter"); the rank that idles forward is then the busy one backward, so a contiguous ring is less
uneven, and striping gains less over it.

With --documents or --window all of them see that mask: documents are of lognormal lengths, drawn alike everywhere. The
single process then runs torch's causal attention document by document, and under a window, which torch's public
function lacks, the kernel of the ring. With real ranks the striped ring without that mask takes turns with the rest
("dense"), so that the cost of a visible pair can be compared.

With --emulate-ranks N one process runs every rank's hops one after the other, and the critical path is what a ring of N
such devices with free communication would take. Timed is the kernel, forward and backward, in every hop that sees
something, on a CPU in CPU seconds; not timed is making the mask of a hop and its tiles, which a model does once a batch
for all its layers.
"""

import functools
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from benchmarks.common import DTYPES, write_json
from benchmarks.document_packs import random_starts
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout, auto_stripe_size
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_runs
from megatron_ring.context_parallel.traffic import queries_are_lighter
from megatron_ring.errors import ConfigError, flag, reporting_errors
from megatron_ring.kernels.attention import (
    KERNELS,
    choose,
    stack_to_kernel_layout,
    stripe_widths,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.support import Feature
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.environment import free_port, keep_freed_memory
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.timeline import Timeline, bound_over_ring, counted

LAYOUTS = ("ring", "striped", "zigzag")
DENSE, LIGHTER = "dense", "lighter"


@dataclass(frozen=True)
class Options:
    nproc: int = 2
    """Ranks of the ring, each a process."""
    emulate_ranks: int = 0
    """Run the hops of this many ranks one after the other in one process instead."""
    seq_length: int = 16384
    """Tokens of the whole sequence."""
    documents: int = 0
    """Mean length of the documents packed in the sequence; 0: one long document."""
    window: int = 0
    """Keys a token sees, itself included; 0: all behind it."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Size of a head."""
    batch: int = 1
    """Sequences."""
    stripe_size: int | Literal["auto"] = "auto"
    """Neighbouring tokens in a stripe of the striped layout; auto: as a training run has them."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the tensors."""
    attention_kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """What computes a hop."""
    rounds: int = 5
    """Timed rounds, after one that warms up (emulated ranks: one hop). 0: the work is counted and nothing is timed."""
    json: str = ""
    """Write the results to this file too."""


@dataclass(frozen=True)
class Case:
    """What runs on a ring: a layout under a mask."""

    layout: Layout
    mask: Mask

    @functools.cached_property
    def count(self) -> Timeline:
        return counted(self.layout, self.mask)


@dataclass(frozen=True)
class Times:
    """Seconds of every case and of "single", by name, and of every hop where ranks are emulated. Empty: not timed."""

    seconds: dict[str, float]
    hops: dict[str, Timeline]


@dataclass(frozen=True)
class Result:
    """One row of the table; None where nothing was timed, or there is nothing to compare with.

    ``bound`` is on speedup_over_ring, ``efficiency`` is single process over ring, ``cost_per_pair_over_dense`` is the
    time of a visible pair over what it is in the striped ring without documents and window.
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
    _check(options)
    cases = _cases(options)
    times = _measure(options, cases)
    findings = _findings(options, cases, times)
    _report(findings)
    write_json(options.json, findings)


def _check(options: Options) -> None:
    names = ("emulate_ranks", "documents", "window", "rounds")
    wrong = [(name, value) for name in names if (value := getattr(options, name)) < 0]
    if wrong:
        raise ConfigError(f"{n} {value} must be at least 0. Set {flag(n)}." for n, value in wrong)


# ---- what the options ask for ----


def _cases(options: Options) -> dict[str, Case]:
    """The layouts under the mask that was asked for, and the striped one without it to compare the cost of a pair."""
    mask = _mask(options)
    cases = {name: Case(_layout(name, options, mask), mask) for name in LAYOUTS}
    # Not beside emulated ranks: what they are for is long, and takes hours without its documents.
    if mask != CAUSAL and not options.emulate_ranks:
        cases[DENSE] = Case(_layout("striped", options, CAUSAL), CAUSAL)
    return cases


def _mask(options: Options) -> Mask:
    if not options.documents:
        return Mask(options.window)
    return Mask(
        options.window,
        random_starts(options.documents, options.seq_length, options.batch),
        options.batch,
    )


def _layout(name: str, options: Options, mask: Mask) -> Layout:
    stripe = stripe_size(options, mask) if name == "striped" else 1
    return Layout(name, options.seq_length, _ring_size(options), stripe)


def stripe_size(options: Options, mask: Mask) -> int:
    """What --stripe-size stands for."""
    if options.stripe_size != "auto":
        return options.stripe_size
    widths = stripe_widths(_kernel(options), _device_type(options))
    packed = bool(mask.document_starts)
    return auto_stripe_size(options.seq_length, _ring_size(options), widths, packed, mask.window)


def _ring_size(options: Options) -> int:
    return options.emulate_ranks or options.nproc


def _device_type(options: Options) -> str:
    processes = 1 if options.emulate_ranks else options.nproc
    return "cuda" if torch.cuda.device_count() >= processes else "cpu"


def _kernel(options: Options) -> str:
    features = {
        Feature.DOCUMENTS: options.documents > 0,
        Feature.WINDOW: options.window > 0,
        Feature.GROUPED_HEADS: options.heads != options.kv_heads,
    }
    wanted = [feature for feature, is_wanted in features.items() if is_wanted]
    asked, dtype = options.attention_kernel, DTYPES[options.dtype]
    return choose(asked, _device_type(options), dtype, options.head_dim, wanted).name


def _tensors(options: Options, tokens: int, samples_end_to_end: int = 1) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, each (batch, tokens, heads, head size)."""
    batch, tokens = options.batch // samples_end_to_end, samples_end_to_end * tokens
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    shape = [(batch, tokens, h, options.head_dim) for h in heads]
    return [
        torch.randn(s, device=_device_type(options), dtype=DTYPES[options.dtype]) for s in shape
    ]


# ---- what is told ----


def _findings(options: Options, cases: dict[str, Case], times: Times) -> dict:
    emulated = f"{options.emulate_ranks} emulated ranks, communication not counted"
    documents = ", document by document" if options.documents else ""
    return {
        "setting": emulated if options.emulate_ranks else f"{options.nproc} ranks",
        "device": torch.cuda.get_device_name() if _device_type(options) == "cuda" else "CPU",
        "emulated": bool(options.emulate_ranks),
        "options": vars(options),
        "documents": options.documents,
        "document_count": len(cases["ring"].mask.document_starts) or options.batch,
        "window": options.window,
        "visible_pairs": _pairs(cases["ring"], options.batch),
        "single": "the ring's kernel" if options.window else f"torch's causal attention{documents}",
        "single_seconds": times.seconds.get("single"),
        "dense_stripe_size": cases[DENSE].layout.stripe_size if DENSE in cases else None,
        "dense_seconds": times.seconds.get(DENSE),
        "lighter_seconds": times.seconds.get(LIGHTER),
        "results": [vars(_result(name, cases, times, options.batch)) for name in LAYOUTS],
    }


def _result(name: str, cases: dict[str, Case], times: Times, batch: int) -> Result:
    per_pair = {
        case: seconds / _pairs(cases[case], batch)
        for case, seconds in times.seconds.items()
        if case in cases
    }
    case, seconds = cases[name], times.seconds.get(name)
    return Result(
        layout=name,
        stripe_size=case.layout.stripe_size,
        seconds=seconds,
        speedup_over_ring=_over(times.seconds.get("ring"), seconds),
        bound=_bound(name, cases),
        efficiency=_over(times.seconds.get("single"), seconds),
        imbalance_counted=case.count.imbalance,
        imbalance_timed=times.hops[name].imbalance if times.hops else None,
        cost_per_pair_over_dense=_over(per_pair.get(name), per_pair.get(DENSE)),
    )


def _pairs(case: Case, batch: int) -> int:
    """Visible pairs of a head in the whole batch, of which the mask may cover one sample or all."""
    return int(case.count.work_RR.sum()) * (batch // case.mask.samples)


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def _bound(name: str, cases: dict[str, Case]) -> float:
    if name == "ring" or cases[name].mask == CAUSAL:
        return bound_over_ring(name, cases[name].layout.ring_size)
    return cases["ring"].count.gain_of_balance


# By the field of a result: its title, width and digits.
_COLUMNS = {
    "stripe_size": ("stripe", 8, 0),
    "seconds": ("seconds", 10, 4),
    "speedup_over_ring": ("over ring", 11, 3),
    "bound": ("bound", 8, 3),
    "efficiency": ("efficiency", 12, 3),
    "imbalance_counted": ("slowest/mean", 14, 4),
    "imbalance_timed": ("timed", 8, 3),
    "cost_per_pair_over_dense": ("pair/dense", 12, 3),
}


def _report(findings: dict) -> None:
    options = findings["options"]
    rounds = (
        f"median of {options['rounds']} rounds" if options["rounds"] else "counted and not timed"
    )
    print(f"{findings['device']}, {options['dtype']}, {findings['setting']}, {options['seq_length']} tokens, forward + "
          f"backward, {rounds}")  # fmt: skip
    if options["documents"] or options["window"]:
        print(_mask_line(findings))
    print(f"single: {findings['single']}")
    print(f"{'layout':<10}" + "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS.values()))
    single = {"layout": "single", "seconds": findings["single_seconds"], "efficiency": 1.0}
    dense = {
        "layout": DENSE,
        "seconds": findings["dense_seconds"],
        "stripe_size": findings["dense_stripe_size"],
    }
    lighter = {"layout": LIGHTER, "seconds": findings["lighter_seconds"], "stripe_size": 1}
    beside = [row for row in (single, dense, lighter) if row["seconds"]]
    print("\n".join(_line(row) for row in (*beside, *findings["results"])))


def _mask_line(findings: dict) -> str:
    drawn = f"{findings['document_count']} documents, drawn for a mean of {findings['documents']} tokens"
    documents = drawn if findings["documents"] else "no documents"
    window = f"a window of {findings['window']}" if findings["window"] else "no window"
    return f"{documents}; {window}; {findings['visible_pairs']:,} visible pairs"


def _line(row: dict) -> str:
    cells = [(row.get(field), width, digits) for field, (_, width, digits) in _COLUMNS.items()]
    shown = (
        f"{value:>{width}.{digits}f}" if value is not None else " " * width
        for value, width, digits in cells
    )
    return f"{row['layout']:<10}" + "".join(shown)


# ---- real ranks ----


def _measure(options: Options, cases: dict[str, Case]) -> Times:
    if options.rounds == 0:
        return Times({}, {})
    return _emulate(options, cases) if options.emulate_ranks else Times(_spawn(options), {})


def _spawn(options: Options) -> dict[str, float]:
    port = free_port()
    if options.documents or options.window:
        # Between many short operators a thread with nothing to do spins, and on a busy machine it is waited for.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, args=(options, port, results), nprocs=options.nproc)
    return results.get()


def _rank(rank: int, options: Options, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_cuda = _device_type(options) == "cuda"
    if on_cuda:
        torch.cuda.set_device(rank)
    else:
        keep_freed_memory()  # as a training run has it
    dist.init_process_group("nccl" if on_cuda else "gloo", rank=rank, world_size=options.nproc)
    torch.set_num_threads(1)
    contenders = _contenders(rank, options)
    seconds = {name: [] for name in contenders}
    for turn in range(options.rounds + 1):
        # Each round in another order: a run inherits caches, heap and heat from the one before it.
        for name in random.Random(turn).sample(list(contenders), len(contenders)):
            seconds[name].append(_together(contenders[name]))
    if rank == 0:
        results.put({name: statistics.median(times[1:]) for name, times in seconds.items()})
    dist.barrier()
    dist.destroy_process_group()


def _contenders(rank: int, options: Options) -> dict[str, Callable[[], None]]:
    groups = ProcessGroups.build(Grid(ring=options.nproc), rank)
    cases = _cases(options)
    contenders = {name: _ring_run(case, groups, options) for name, case in cases.items()}
    if options.nproc > 1 and _sends_queries(options):
        contenders |= {
            "ring": _published_run(cases["ring"], groups, options),
            LIGHTER: contenders["ring"],
        }
    contenders["single"] = _single_run(options, options.nproc) if rank == 0 else lambda: None
    return contenders


def _ring_run(case: Case, groups: ProcessGroups, options: Options) -> Callable[[], None]:
    attention = ContextParallelAttention(case.layout, _kernel(options), groups)
    *qkv, dout = _tensors(options, case.layout.shard_length)
    inputs = [x.requires_grad_() for x in qkv]
    starts = torch.tensor(case.mask.document_starts) if case.mask.document_starts else None

    def run() -> None:
        out, _ = attention(*inputs, case.mask.window, starts)
        torch.autograd.grad(out, inputs, dout)

    return run


def _sends_queries(options: Options) -> bool:
    """Whether our ring sends queries backward with such heads."""
    q, k, v, _ = _tensors(options, tokens=1)
    return queries_are_lighter(q, torch.stack([k, v]))


def _published_run(case: Case, groups: ProcessGroups, options: Options) -> Callable[[], None]:
    """Ring Attention as Liu et al. 2023 have it (section 3): keys and values go around backward as they do forward."""
    q, k, v, dout = _tensors(options, case.layout.shard_length, case.mask.samples)
    exchange, kernel = RingExchange.over(groups.ring_links), _kernel(options)
    ring = ring_loop.Ring(
        case.layout, exchange.ring_rank, KERNELS[kernel], options.head_dim**-0.5, exchange, case.mask,
        sends_queries=lambda q, kv: False, in_halves=exchange.is_slow,
    )  # fmt: skip

    def run() -> None:
        own_q, kv = to_kernel_layout(kernel, q), stack_to_kernel_layout(kernel, [k, v])
        out, lse = ring_loop.forward(own_q, kv, ring)
        ring_loop.backward(dout, None, own_q, kv, out, lse, ring)

    return run


def _single_run(options: Options, threads: int) -> Callable[[], None]:
    """One process on the whole sequence, without a ring; by torch's public function, which knows no window."""
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


def _together(run: Callable[[], None]) -> float:
    """Seconds of ``run`` from a common start to the last rank's end."""
    dist.barrier()
    seconds = _seconds(run)
    slowest = torch.tensor(seconds, device="cuda" if torch.cuda.is_initialized() else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _seconds(run: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    _finish()
    start = clock()
    run()
    _finish()
    return clock() - start


def _finish() -> None:
    """Wait for what the device still has to do; the CPU has done it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- emulated ranks ----


def _alone(run: Callable[[], None]) -> float:
    """Seconds of what waits for nobody: of a CPU those that it worked, whatever else the machine did meanwhile."""
    return _seconds(run, time.perf_counter if torch.cuda.is_initialized() else time.process_time)


def _emulate(options: Options, cases: dict[str, Case]) -> Times:
    """Critical paths by layout beside the single process divided by the number of ranks; and the hops' times."""
    torch.set_num_threads(1)
    single, hop = _single_run(options, threads=1), _hop(options, cases["ring"])
    rounds = [(_alone(single), _emulated_round(hop, cases)) for _ in range(options.rounds)]
    hops = {
        name: Timeline(torch.stack([work[name] for _, work in rounds]).median(dim=0).values)
        for name in cases
    }
    seconds = {name: timeline.critical_path for name, timeline in hops.items()}
    seconds["single"] = statistics.median(whole for whole, _ in rounds) / options.emulate_ranks
    return Times(seconds, hops)


def _emulated_round(
    hop: Callable[[KeyRanges], float], cases: dict[str, Case]
) -> dict[str, torch.Tensor]:
    """Seconds of every hop and rank, (R, R), by layout. The layouts take turns; a hop that sees nothing takes none."""
    work = {name: torch.zeros_like(case.count.work_RR) for name, case in cases.items()}
    ranks = range(cases["ring"].layout.ring_size)
    for step, rank, (name, case) in itertools.product(ranks, ranks, cases.items()):
        if case.count.work_RR[step, rank]:
            work[name][step, rank] = hop(
                hop_runs(case.layout, rank, (rank - step) % len(ranks), case.mask)
            )
    return work


def _hop(options: Options, case: Case) -> Callable[[KeyRanges], float]:
    """The seconds of a hop, given its runs: the kernel's forward and backward, as the ring calls them.

    Every hop has the same tensors, of a shard, and continues one softmax. It starts with the first hop of ``case``, in
    which every query sees itself.
    """
    name, scale = _kernel(options), options.head_dim**-0.5
    *qkv, dout = _tensors(options, case.layout.shard_length, case.mask.samples)
    kernel, (q, k, v) = KERNELS[name], (to_kernel_layout(name, x) for x in qkv)
    state = RunningSoftmax.empty(q)
    gradients = [torch.zeros_like(x, dtype=state.out_BLHD.dtype) for x in (q, k, v)]

    def both_ways(runs: KeyRanges) -> None:
        kernel.forward(q, k, v, runs, scale, state)
        kernel.backward(
            dout, q, k, v, state.out_BLHD.to(q.dtype), state.lse_BHL, runs, scale, *gradients
        )

    def seconds(runs: KeyRanges) -> float:
        thin = [x[:1, :, :1, :8] for x in (q, k, v)]
        kernel.forward(
            *thin, runs, scale, RunningSoftmax.empty(thin[0])
        )  # makes the tiles, at little cost
        return _alone(functools.partial(both_ways, runs))

    seconds(hop_runs(case.layout, 0, 0, case.mask))
    return seconds


if __name__ == "__main__":
    with reporting_errors():
        main()
