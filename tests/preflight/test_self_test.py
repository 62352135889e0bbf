"""The self-test passes where all is well, and names each fault with its rank, the same on every rank."""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ring.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_ring.data.tokens import TokenStoreWriter
from megatron_ring.errors import DataError, MegatronRingError
from megatron_ring.kernels.attention import KERNELS, sdpa
from megatron_ring.parallel.collective_errors import run_checked
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.process_id import Process, in_words
from megatron_ring.preflight import consistency as alike
from megatron_ring.preflight import consistency as facts
from megatron_ring.preflight import link_bandwidth as hops
from megatron_ring.preflight import reachability as neighbours
from megatron_ring.preflight.exactness import allowed
from megatron_ring.preflight.self_test import Report, self_test
from megatron_ring.settings.setup import Setup
from tests.distributed import run_ranks
from tests.programs import free_port, start_rank, working_folder

SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [1.0, 0.0]}
training: {train_iters: 1, lr_decay_style: constant, eval_interval: 0, dtype: fp32}
"""
CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2),
    parallel=ParallelConfig(context_parallel="striped"),
    data=DataConfig(seq_length=64),
    training=TrainingConfig(dtype="fp32"),
)


def changed(**sections: dict) -> Config:
    return replace(
        CONFIG,
        **{name: replace(getattr(CONFIG, name), **fields) for name, fields in sections.items()},
    )


# Four ranks each: (config, links in its rings).
PASSING = {
    "ring of 4, striped": (changed(), 4),
    "wide stripes, bf16": (changed(data={"seq_length": 4096}, training={"dtype": "bf16"}), 4),
    "zigzag x Ulysses 2": (
        changed(parallel={"context_parallel": "zigzag", "ulysses_degree": 2}),
        4,
    ),
    "tensor 2 x pipe 2": (
        changed(parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        0,
    ),
    "data 2 x ring 2, packed, windows": (
        changed(
            parallel={"context_parallel_size": 2, "context_parallel": "ring"},
            data={"reset_attention_mask": True},
            model={"window_size": 8, "window_attn_skip_freq": 2},
        ),
        4,
    ),
    "one key-value head, bf16": (
        changed(
            model={"num_attention_heads": 64, "num_query_groups": 1, "kv_channels": 32},
            training={"dtype": "bf16"},
        ),
        4,
    ),
    "data 4": (changed(parallel={"context_parallel": "none"}), 0),
}


def report_of(config: Config, consensus: Consensus) -> Report:
    setup = Setup.of(config, consensus.ranks)
    return self_test(setup, ProcessGroups.build(setup.grid, consensus.rank), consensus)


def passes(rank: int, world_size: int) -> dict[str, Report]:
    consensus = Consensus.build()
    return {name: report_of(config, consensus) for name, (config, _) in PASSING.items()}


@pytest.fixture(scope="module")
def passed() -> list[dict[str, Report]]:
    return run_ranks(4, passes)


@pytest.mark.parametrize("name", PASSING)
def test_where_all_is_well_every_rank_knows_it(name, passed):
    reports = [of_rank[name] for of_rank in passed]
    assert len({report.line() for report in reports}) == 1
    report, links = reports[0], PASSING[name][1]
    assert all(0 < error <= limit for error, limit in zip(report.errors, allowed(report.setup)))
    assert [process.global_rank for process in report.processes] == [0, 1, 2, 3]
    assert len(report.links) == links


def test_one_line_says_it(passed):
    host = re.escape(socket.gethostname())
    ring = rf"self-test        4 ranks agree; ring = local attention to \de-0[67]; \S+ MB/s a hop of 4,096 bytes, " \
           rf"slowest \d -> \d \({host} -> {host}\) \S+"  # fmt: skip
    assert re.fullmatch(ring, passed[0]["ring of 4, striped"].line().splitlines()[0])
    alone = r"self-test        4 ranks agree; attention = plain attention to \de-0[67]"
    assert re.fullmatch(alone, passed[0]["data 4"].line())
    report = passed[0]["zigzag x Ulysses 2"].in_full()
    off = ", ".join(rf"{name} \S+e-0[67] \(2.5e-06\)" for name in ("out", "dq", "dk", "dv"))
    assert re.search(
        rf"^attention        ring = local attention by sdpa in fp32: off by \(allowed\) {off}",
        report,
        re.M,
    )
    assert len(re.findall(rf"\d -> \d \({host} -> {host}\) \S+$", report, re.M)) == 4
    assert report.endswith("self-test        passed")


# ---- faults: each in four ranks, of which one or two are wrong ----


def another_option(rank: int, consensus: Consensus, folder: Path) -> None:
    other = {2: changed(training={"lr": 0.5}), 3: changed(data={"seq_length": 66})}
    alike.check_options_and_code(other.get(rank, CONFIG), consensus)


def other_code(rank: int, consensus: Consensus, folder: Path) -> None:
    source, commit = ("abc", "9f3+") if rank == 1 else ("def", "9f3")
    found = facts._version
    lacks = {"deepspeed": "not installed"} if rank == 2 else {}
    versions = put(facts, _version=lambda name: lacks.get(name) or found(name))
    with put(facts, _source_hash=lambda: source), put(alike, commit=lambda: commit), versions:
        alike.check_options_and_code(CONFIG, consensus)


def other_data(rank: int, consensus: Consensus, folder: Path) -> None:
    own = folder / str(rank)
    own.mkdir()
    with contextlib.chdir(own):
        with TokenStoreWriter("tokens", np.uint16) as writer:
            writer.add_document([1, 2] if rank == 3 else [1, 2, 3])
        alike.check_data(DataConfig(data_path=("tokens",)), consensus)


def no_data(rank: int, consensus: Consensus, folder: Path) -> None:
    def open_data() -> None:
        if rank == 3:
            raise DataError("no tokens.bin")

    run_checked(consensus, open_data)


def another_order(rank: int, consensus: Consensus, folder: Path) -> None:
    """As if the ring had been built 0, 2, 1, 3."""

    def permuted(groups: ProcessGroups) -> RingExchange:
        members = (0, 2, 1, 3)
        return RingExchange(members, groups.ring_links, members.index(rank))

    with put(neighbours, ring_exchange=permuted):
        report_of(CONFIG, consensus)


def another_group(rank: int, consensus: Consensus, folder: Path) -> None:
    """As if the tensor axis ran where the data axis does."""
    groups = ProcessGroups.build(Grid(data=2, tensor=2), rank)
    crossed, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    processes = consensus.gather(lambda: Process.here(rank))
    crossing = replace(groups, tensor=crossed)
    neighbours.check_neighbours(Grid(data=2, tensor=2), crossing, processes, consensus, "cpu")


def a_kernel_that_is_wrong(rank: int, consensus: Consensus, folder: Path) -> None:
    def forward(q, k, v, runs, scale, state) -> None:
        sdpa.forward(q, k, v, runs, 1.001 * scale, state)

    if rank == 1:
        KERNELS["sdpa"] = SimpleNamespace(forward=forward, backward=sdpa.backward)
    try:
        report_of(CONFIG, consensus)
    finally:
        KERNELS["sdpa"] = sdpa


FAULTS = {
    another_option: [
        "seq_length is not the same on all ranks: 64 on ranks 0-2 (HOST); 66 on rank 3 (HOST). Give every rank the "
        "same --seq-length.",
        "lr is not the same on all ranks: 0.001 on ranks 0-1, 3 (HOST); 0.5 on rank 2 (HOST). Give every rank the "
        "same --lr.",
    ],
    other_code: [
        "source of megatron_ring is not the same on all ranks: def on ranks 0, 2-3 (HOST); abc on rank 1 (HOST). Give "
        "every host the same.",
        "version of deepspeed is not the same on all ranks: DEEPSPEED on ranks 0-1, 3 (HOST); not installed on rank 2 "
        "(HOST). Give every host the same.",
        "commit is not the same on all ranks: 9f3 on ranks 0, 2-3 (HOST); 9f3+ on rank 1 (HOST). Check out one.",
    ],
    other_data: [
        "size of tokens.bin is not the same on all ranks: 6 bytes on ranks 0-2 (HOST); 4 bytes on rank 3 (HOST). Copy "
        "the store anew to where it differs."
    ],
    no_data: ["on rank 3 (HOST): no tokens.bin"],
    another_order: [
        "rank 0 (HOST, process PID) meets rank 2 (HOST, process PID) as the rank after it in its ring, where the grid "
        "has rank 1 (HOST, process PID).",
        "rank 1 (HOST, process PID) meets rank 2 (HOST, process PID) as the rank before it in its ring, where the grid "
        "has rank 0 (HOST, process PID).",
        "rank 1 (HOST, process PID) meets rank 3 (HOST, process PID) as the rank after it in its ring, where the grid "
        "has rank 2 (HOST, process PID).",
    ],
    another_group: [
        "rank 0 (HOST, process PID) meets rank 2 (HOST, process PID) as member 1 of its tensor group, where the grid "
        "has rank 1 (HOST, process PID).",
    ],
    a_kernel_that_is_wrong: [
        "ring attention is not local attention: out is wrong on rank 1 (HOST), by "
    ],
}


@contextlib.contextmanager
def put(module, **attributes):
    """What monkeypatch does, in a rank."""
    kept = {name: getattr(module, name) for name in attributes}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        module.__dict__.update(kept)


def meet_with(rank: int, world_size: int, folder: Path) -> dict[str, MegatronRingError]:
    consensus, met = Consensus.build(), {}
    for fault in FAULTS:
        with pytest.raises(MegatronRingError) as raised:
            fault(rank, consensus, folder)
        met[fault.__name__] = raised.value
    return met


@pytest.fixture(scope="module")
def met(tmp_path_factory) -> list[dict[str, MegatronRingError]]:
    """What each of four ranks was told of each fault."""
    return run_ranks(4, meet_with, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named_alike_on_every_rank(fault, met):
    errors = [of_rank[fault.__name__] for of_rank in met]
    assert len({str(error) for error in errors}) == 1
    assert {error.exit_code for error in errors} == {3 if fault is no_data else 2}
    said = re.sub(
        r"process \d+", "process PID", str(errors[0]).replace(socket.gethostname(), "HOST")
    )
    said = said.replace(version("deepspeed"), "DEEPSPEED")
    assert said.startswith("\n".join(FAULTS[fault]))


# ---- links ----


def one_is_late(rank: int, world_size: int) -> Report:
    start = RingExchange.start

    def late(exchange: RingExchange, *arguments) -> object:
        time.sleep(0.02)
        return start(exchange, *arguments)

    if rank == 2:
        RingExchange.start = late
    return report_of(CONFIG, Consensus.build())


def test_what_makes_a_link_slow_is_at_one_of_its_ends():
    """A rank that sends late delays whom it sends to, and often, because it receives late, who sends to it."""
    (said,) = (
        line
        for line in run_ranks(4, one_is_late)[0].line().splitlines()
        if line.startswith("slow links")
    )
    named = set(re.findall(r"(\d) -> (\d) \(", said))
    assert {("2", "3")} <= named <= {("1", "2"), ("2", "3")}


def link(sender: int, receiver: int, rate: float, hosts: str = "aa") -> hops.Link:
    return hops.Link(Process(sender, hosts[0], 1), Process(receiver, hosts[1], 1), rate)


def test_a_link_between_hosts_is_compared_with_others_between_hosts():
    links = [
        link(0, 1, 100.0),
        link(1, 2, 9.0, "ab"),
        link(2, 3, 90.0, "bb"),
        link(3, 0, 10.0, "ba"),
    ]
    assert hops.slow(links) == []
    weak = link(5, 6, 40.0, "bb")
    assert hops.slow([*links, weak]) == [weak]
    assert hops.slow([]) == []


def test_rates_are_said_in_megabytes():
    assert [hops.megabytes(rate) for rate in (2.514e9, 15.6e6, 1.26e6, 40e3)] == [
        "2,514",
        "16",
        "1.3",
        "0.04",
    ]


def test_ranks_are_named_in_runs_and_many_hosts_are_counted():
    processes = [Process(rank, f"node{rank // 2}", 1) for rank in range(8)]
    assert in_words(processes[:3]) == "ranks 0-2 (node0, node1)"
    assert in_words([processes[0], processes[7]]) == "ranks 0, 7 (node0, node3)"
    assert in_words(processes) == "ranks 0-7 (4 hosts)"


# ---- the program ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with small.yaml and a prepared store, text/tokens."""
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


def two_ranks(folder: Path, flags_of: Callable[[int], list[str]]) -> list[tuple[int, str]]:
    """(exit code, what it said) of two ranks without a launcher."""
    port = free_port()
    ranks = [start_rank(rank, port, folder, flags_of(rank)) for rank in (0, 1)]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said)]


def test_a_run_begins_with_the_line(folder):
    (code, said), (code_1, said_1) = two_ranks(folder, lambda rank: [])
    assert (code, code_1) == (0, 0), said + said_1
    assert said.count("self-test        2 ranks agree; ring = local attention to ") == 1
    assert said.index("self-test  ") < said.index("step  ")
    assert "self-test" not in said_1


def test_ranks_of_different_flags_end_with_one_message_and_no_wait(folder):
    # 66 is no length for zigzag on two ranks: alone, rank 1 would have left before it joined.
    other = ["--context-parallel", "zigzag", "--seq-length", "66"]
    (code, said), (code_1, said_1) = two_ranks(folder, lambda rank: other if rank == 1 else [])
    assert (code, code_1) == (2, 2), said + said_1
    assert said.count("seq_length is not the same on all ranks: 64 on rank 0") == 1
    assert "Traceback" not in said + said_1
    assert "ConfigError" not in said_1


def test_alone_it_needs_no_data_and_reports(folder, tmp_path):
    without_data = SMALL.replace("data_path: [text/tokens], ", "")
    (tmp_path / "small.yaml").write_text(without_data)
    (code, said), (code_1, said_1) = two_ranks(tmp_path, lambda rank: ["--self-test"])
    assert (code, code_1) == (0, 0), said + said_1
    assert "processes        alike, and each where the grid has it: ranks 0-1 (" in said
    assert "hops             8,192 bytes; MB/s, the slowest first:" in said
    assert said.count("self-test        passed") == 1
    assert "self-test" not in said_1
    assert not (tmp_path / "data").exists(), "no corpus was prepared"
