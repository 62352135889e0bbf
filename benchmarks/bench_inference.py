"""Measure decoding over a sharded cache, and the longest context within a memory budget.

    python -m benchmarks.bench_inference decode --tokens 65536
    python -m benchmarks.bench_inference memory --nproc 1 4 --plot docs/inference_memory.svg

``decode`` times the attention of one layer for one new token: the product with every cached key,
softmax, the product with the values, and the merge over the ring. In each round rank 0 first
attends to the whole cache alone, then both ranks to half of it each; the figure is the median of
the rounds' ratios, of elapsed time and of the CPU time of the slower rank. The latter leaves out
what a rank waits for, but it is less affected by other programs. Every rank has one thread.

``memory`` searches the longest prompt that can be prefilled in chunks and continued within a budget
for the cache and activations of a rank; weights, which every rank has, are not counted. Live bytes
are those of the allocator (live_memory.py), and the rank with the most counts. A chunk has the same
number of tokens for each rank, whatever the number of ranks.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from benchmarks.common import MIB, check_outputs, commit, size_problems, write_json
from benchmarks.live_memory import LiveBytes
from benchmarks.measure_memory import longest_that
from megatron_ring.config import ModelConfig
from megatron_ring.errors import ConfigError, not_positive, reporting_errors
from megatron_ring.inference.cache import Cache, CacheShape, chunk_owners
from megatron_ring.inference.decode_attention import DecodeStep
from megatron_ring.inference.model import InferenceModel
from megatron_ring.model import initialization
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.collectives import ProcessGroups, RingRank
from megatron_ring.parallel.environment import free_port
from megatron_ring.parallel.grid import Grid

VOCABULARY = 512
CONTINUED_TOKENS = 8


@dataclass(frozen=True)
class Decode:
    """Time the attention of one decoded token on 2 ranks against 1."""

    tokens: int = 65536
    """Cached tokens."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Size of a head."""
    rounds: int = 30
    """Pairs of measurements."""
    json: str = ""
    """Also write the results to this file."""


@dataclass(frozen=True)
class Memory:
    """Search the longest context within a budget."""

    nproc: tuple[int, ...] = (1, 4)
    """Numbers of ranks to measure, one after another; the first is what others are compared to."""
    budget_mib: float = 6.0
    """Most live MiB of a rank, for its cache and activations."""
    chunk_tokens: int = 32
    """Tokens of a prefill chunk for each rank."""
    step: int = 32
    """Resolution of the search, in tokens for each rank."""
    layers: int = 4
    """Layers of the model, of width 128 with two heads."""
    json: str = ""
    """Also write the results to this file."""
    plot: str = ""
    """Plot live bytes by length to this file; its suffix selects the format."""


def main() -> None:
    options = tyro.cli(
        Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[Memory, tyro.conf.subcommand("memory")],
        description=__doc__,
    )
    check_outputs(json=options.json, plot=getattr(options, "plot", ""))
    run = measure_decode if isinstance(options, Decode) else measure_memory
    run(options)


# ---- decoding ----


def measure_decode(options: Decode) -> None:
    """Print the seconds of both sides of every round, and the median ratio."""
    if problems := size_problems(options, "tokens", "head_dim", "rounds"):
        raise ConfigError(problems)
    rounds = run_on_ranks(2, _time_rounds, options)
    print(f"attention of a token over {options.tokens:,} cached tokens, median of {len(rounds)}:")
    for name, pairs in [("elapsed", [r[:2] for r in rounds]), ("CPU", [r[2:] for r in rounds])]:
        one, two = (statistics.median(side) * 1e3 for side in zip(*pairs))
        ratios = sorted(of_two / of_one for of_one, of_two in pairs)
        low, middle, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
        print(
            f"{name} time: 1 rank {one:.2f} ms, 2 ranks {two:.2f} ms, ratio {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f})"
        )
    write_json(options.json, {"commit": commit(), "options": asdict(options), "rounds": rounds})


def _time_rounds(rank: int, groups: ProcessGroups, options: Decode) -> list[list[float]]:
    """Return the seconds of each round: elapsed on 1 and on 2 ranks, and CPU time alike."""
    alone = _decoding(options, RingRank(0, 1, None)) if rank == 0 else None
    together = _decoding(options, RingRank.of(groups.ring_links))
    rounds = []
    for round_number in range(-3, options.rounds):  # the first ones are warm-up
        dist.barrier()
        one = _timed(alone) if alone else (0.0, 0.0)
        dist.barrier()
        two = _timed(together)
        slowest = torch.tensor([one, two], dtype=torch.float64).T.flatten()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if round_number >= 0:
            rounds.append(slowest.tolist())
    return rounds


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the elapsed seconds and those of this process's CPU time."""
    elapsed, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - elapsed, time.process_time() - cpu


def _decoding(options: Decode, ring: RingRank) -> Callable[[], object]:
    """Return a function that attends from one new token to a cache of random numbers."""
    shape = CacheShape(
        {0: 0}, options.kv_heads, options.head_dim, ring.size, ring.rank, layout_name="striped"
    )
    cache = Cache(shape, [options.tokens + 1], torch.float32, "cpu")
    owners = chunk_owners("striped", 1, ring.size, 0, options.tokens + 1)
    cache.ownership.append(0, owners)
    own = cache.ownership.count(0, ring.rank)
    k_cGD, v_cGD = torch.randn(2, own, options.kv_heads, options.head_dim)
    cache.layers[0][0].append(k_cGD, v_cGD, 0)
    step = DecodeStep([0], cache, ring)
    q_B1HD = torch.randn(1, 1, options.heads, options.head_dim)

    def attend() -> None:
        partial = step.attend_shard(0, q_B1HD[:, 0])
        step.merge(partial)

    return attend


# ---- memory ----


@dataclass(frozen=True)
class Measured:
    """Peak live bytes of the rank with the most, for a prompt of ``tokens``."""

    nproc: int
    tokens: int
    live: int
    cache: int


def measure_memory(options: Memory) -> None:
    """Print the live bytes of every prompt tried, and the longest that fits."""
    problems = not_positive(options, "budget_mib", "chunk_tokens", "step", "layers")
    problems += [
        f"nproc {nproc} must be at least 1. Set --nproc." for nproc in options.nproc if nproc < 1
    ]
    if problems:
        raise ConfigError(problems)
    measured = {nproc: run_on_ranks(nproc, _search, options) for nproc in options.nproc}
    longest = {}
    print(f"{'ranks':>5}{'tokens':>10}{'live MiB':>12}{'cache MiB':>12}")
    for nproc, rows in measured.items():
        rows.sort(key=lambda row: row.tokens)
        fitting = [row.tokens for row in rows if row.live <= options.budget_mib * MIB]
        longest[nproc] = max(fitting, default=0)
        for row in rows:
            print(f"{nproc:>5}{row.tokens:>10,}{row.live / MIB:12.2f}{row.cache / MIB:12.2f}")
    first = longest[options.nproc[0]]
    for nproc, tokens in longest.items():
        ratio = f", {tokens / first:.2f} times that of {options.nproc[0]}" if first else ""
        print(f"{options.budget_mib:g} MiB a rank: at most {tokens:,} tokens on {nproc}{ratio}")
    rows = [asdict(row) for of_nproc in measured.values() for row in of_nproc]
    findings = {"commit": commit(), "options": asdict(options), "longest": longest}
    write_json(options.json, findings | {"measured": rows})
    if options.plot:
        _draw(options, measured, longest)


def _search(rank: int, groups: ProcessGroups, options: Memory) -> list[Measured]:
    """Measure prompts until the longest that fits is found; all ranks try the same ones."""
    config = ModelConfig(num_layers=options.layers, hidden_size=128, num_attention_heads=2)
    ranks = RingRank.of(groups.ring_links).size
    gpt = initialization.build(GPT, config, VOCABULARY, 4096, None, seed=1).requires_grad_(False)
    model = InferenceModel(gpt, groups, kernel="sdpa")
    rows = []
    unit = options.step * ranks

    def measure(tokens: int) -> Measured:
        chunk = options.chunk_tokens * ranks
        rows.append(_measure(model, tokens, chunk, ranks))
        return rows[-1]

    # A first prompt loads what is loaded once; then memory is linear in the length.
    measure(unit)
    del rows[:]
    short, long = (measure(multiple * unit) for multiple in (8, 24))
    of_token = (long.live - short.live) / (long.tokens - short.tokens)
    guess = short.tokens + int((options.budget_mib * MIB - short.live) / of_token)
    longest_that(lambda n: measure(n).live <= options.budget_mib * MIB, unit, max(guess, 0))
    return rows


def _measure(model: InferenceModel, tokens: int, chunk_size: int, ranks: int) -> Measured:
    prompt = torch.arange(tokens) % VOCABULARY
    gc.collect()
    with LiveBytes() as live:
        cache = model.new_cache(1, [tokens + CONTINUED_TOKENS])
        logits_BV = model.prefill([prompt], cache, chunk_size)
        for _ in range(CONTINUED_TOKENS):
            logits_BV = model.decode(logits_BV.argmax(-1).tolist(), cache)
        allocated = cache.nbytes
        del cache, logits_BV
    peak = torch.tensor(live.peak)
    if ranks > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return Measured(ranks, tokens, int(peak), allocated)


def _draw(options: Memory, measured: dict[int, list[Measured]], longest: dict[int, int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "inference memory"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="tight")
    for nproc, rows in measured.items():
        lengths = [row.tokens for row in rows]
        label = f"{nproc} rank{'s' * (nproc > 1)}"
        live = [row.live / MIB for row in rows]
        (line,) = axes.plot(lengths, live, "o-", markersize=4, linewidth=1, label=label)
        cached = [row.cache / MIB for row in rows]
        axes.plot(lengths, cached, "--", linewidth=1, color=line.get_color())
        axes.annotate(
            f"{longest[nproc]:,}",
            (longest[nproc], 0),
            (-4, 4),
            color=line.get_color(),
            ha="right",
            textcoords="offset points",
            fontsize=9,
        )
    axes.axhline(options.budget_mib, color="#222222", linewidth=1, label="budget per rank")
    axes.set(
        xlabel="tokens of the prompt",
        ylabel="peak live MiB per rank (dashed: cache)",
        xlim=0,
        ylim=0,
    )
    axes.legend(frameon=False)
    figure.savefig(options.plot, metadata={"Date": None} if options.plot.endswith(".svg") else None)
    print(f"drew {options.plot}")


# ---- real ranks ----


def run_on_ranks(nproc: int, body: Callable, options: Decode | Memory) -> list:
    """Run ``body(rank, groups, options)`` on a ring of new processes; return rank 0's result."""
    port = free_port()
    # No messages about the profiler's start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_run_rank, (nproc, port, body, options, results), nprocs=nproc)
    return results.get()


def _run_rank(rank: int, nproc: int, port: int, body: Callable, options, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=nproc)
    groups = ProcessGroups.build(Grid(ring=nproc), rank)
    result = body(rank, groups, options)
    if rank == 0:
        results.put(result)
    # Without both, a rank that has finished may abort the last transfer of another.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with reporting_errors():
        main()
