"""The self-test passes on a sound grid and names each fault with its rank, alike on all ranks."""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ring.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.tokens import TokenStoreWriter
from megatron_ring.errors import DataError, MegatronRingError
from megatron_ring.kernels.attention import KERNELS, HopInputs, sdpa, torch_operators
from megatron_ring.kernels.memory_contract import UNRESTRICTED
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.consensus import Consensus, run_checked
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.process_id import ProcessId, describe_processes
from megatron_ring.preflight import consistency, link_bandwidth, reachability
from megatron_ring.preflight.exactness import error_limits
from megatron_ring.preflight.self_test import SelfTestReport, self_test
from megatron_ring.settings.run_settings import RunSettings
from tests.distributed import run_ranks
from tests.kernels.attention.torch_stand_ins import stand_ins_for_cuda_operators
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
    "two samples with sinks, packed, bf16": (
        changed(
            data={"reset_attention_mask": True},
            model={"softmax_type": "learnable"},
            training={"dtype": "bf16", "micro_batch_size": 3},
        ),
        4,
    ),
}


def report_of(config: Config, consensus: Consensus) -> SelfTestReport:
    setup = RunSettings.resolve(config, consensus.ranks)
    return self_test(setup, ProcessGroups.build(setup.grid, consensus.rank), consensus)


def run_passing(rank: int, world_size: int) -> dict[str, SelfTestReport]:
    consensus = Consensus.build()
    return {name: report_of(config, consensus) for name, (config, _) in PASSING.items()}


@pytest.fixture(scope="module")
def passed() -> list[dict[str, SelfTestReport]]:
    return run_ranks(4, run_passing)


@pytest.mark.parametrize("name", PASSING)
def test_every_rank_has_the_same_report_of_a_sound_grid(name, passed):
    reports = [of_rank[name] for of_rank in passed]
    assert len({report.summary() for report in reports}) == 1
    report = reports[0]
    _, links = PASSING[name]
    limits = error_limits(report.setup)
    assert all(0 < error <= limit for error, limit in zip(report.errors, limits))
    assert [process.global_rank for process in report.processes] == [0, 1, 2, 3]
    assert len(report.links) == links


def test_the_report_has_errors_and_link_bandwidth(passed):
    host = re.escape(socket.gethostname())
    ring = (
        r"self-test        4 ranks agree; ring = local attention to \de-0[67]; \S+ MB/s a hop of "
        rf"4,096 bytes, slowest \d -> \d \({host} -> {host}\) \S+"
    )
    assert re.fullmatch(ring, passed[0]["ring of 4, striped"].summary().splitlines()[0])
    alone = r"self-test        4 ranks agree; attention = plain attention to \de-0[67]"
    assert re.fullmatch(alone, passed[0]["data 4"].summary())
    report = passed[0]["zigzag x Ulysses 2"].full_text()
    errors = ", ".join(rf"{name} \S+e-0[67] \(2.5e-06\)" for name in ("out", "dq", "dk", "dv"))
    attention = "attention        ring = local attention, kernel sdpa in fp32: error"
    assert re.search(rf"^{attention}.* {errors}$", report, re.M)
    assert len(re.findall(rf"\d -> \d \({host} -> {host}\) \S+$", report, re.M)) == 4
    assert report.endswith("self-test        passed")


# ---- faults: four ranks each, of which one or two are wrong ----


def run_with_another_option(rank: int, consensus: Consensus, folder: Path) -> None:
    other = {2: changed(training={"lr": 0.5}), 3: changed(data={"seq_length": 66})}
    consistency.check_options_and_code(other.get(rank, CONFIG), consensus)


def run_with_other_code(rank: int, consensus: Consensus, folder: Path) -> None:
    source, commit = ("abc", "9f3+") if rank == 1 else ("def", "9f3")
    installed_version = consistency._version
    missing = {"deepspeed": "not installed"} if rank == 2 else {}
    with patched(
        consistency,
        _source_hash=lambda: source,
        commit=lambda: commit,
        _version=lambda name: missing.get(name) or installed_version(name),
    ):
        consistency.check_options_and_code(CONFIG, consensus)


def run_with_another_gpu(rank: int, consensus: Consensus, folder: Path) -> None:
    """As if --stripe-size auto had followed another GPU on rank 2."""
    layout = Layout("striped", 1024, 4, stripe_size=1 if rank == 2 else 128)
    consistency.check_layout(layout, consensus)


def run_with_other_data(rank: int, consensus: Consensus, folder: Path) -> None:
    own = folder / str(rank)
    own.mkdir()
    with contextlib.chdir(own):
        with TokenStoreWriter("tokens", np.uint16) as writer:
            writer.add_document([1, 2] if rank == 3 else [1, 2, 3])
        consistency.check_data(DataConfig(data_path=("tokens",)), consensus)


def run_without_data(rank: int, consensus: Consensus, folder: Path) -> None:
    def open_data() -> None:
        if rank == 3:
            raise DataError("no tokens.bin")

    run_checked(consensus, open_data)


def run_with_ring_in_another_order(rank: int, consensus: Consensus, folder: Path) -> None:
    """As if the ring had been built 0, 2, 1, 3."""

    def permuted(groups: ProcessGroups) -> RingExchange:
        members = (0, 2, 1, 3)
        return RingExchange(members, groups.ring_links, members.index(rank))

    with patched(reachability, ring_exchange=permuted):
        report_of(CONFIG, consensus)


def run_with_another_group(rank: int, consensus: Consensus, folder: Path) -> None:
    """As if the tensor axis ran where the data axis does."""
    groups = ProcessGroups.build(Grid(data=2, tensor=2), rank)
    crossed, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    processes = consensus.gather(lambda: ProcessId.here(rank))
    crossing = replace(groups, tensor=crossed)
    reachability.check_neighbours(Grid(data=2, tensor=2), crossing, processes, consensus, "cpu")


def run_with_a_wrong_kernel(rank: int, consensus: Consensus, folder: Path) -> None:
    def forward(inputs: HopInputs, state) -> None:
        sdpa.forward(inputs._replace(scale=1.001 * inputs.scale), state)

    if rank == 1:
        KERNELS["sdpa"] = SimpleNamespace(forward=forward, backward=sdpa.backward)
    try:
        report_of(CONFIG, consensus)
    finally:
        KERNELS["sdpa"] = sdpa


def run_with_an_operator_that_misreads_halves_of_heads(
    rank: int, consensus: Consensus, folder: Path
) -> None:
    """As on a GPU: torch's operators for CUDA, and messages slow enough for halves of heads."""
    memory = torch_operators._EFFICIENT_BACKWARD.memory
    with (
        stand_ins_for_cuda_operators(),
        mock.patch.dict(KERNELS, sdpa=sdpa.ON_CUDA),
        mock.patch.object(RingExchange, "is_slow", True),
    ):
        config = changed(data={"reset_attention_mask": True}, training={"dtype": "bf16"})
        report_of(config, consensus)
        with mock.patch.dict(memory, out=UNRESTRICTED):
            report_of(config, consensus)


# By fault: for each problem that the error lists, in order, what its text must contain, in order.
FAULTS = {
    run_with_another_option: [
        ["seq_length", "64 on ranks 0-2 (HOST)", "66 on rank 3 (HOST)", "--seq-length"],
        ["lr ", "0.001 on ranks 0-1, 3 (HOST)", "0.5 on rank 2 (HOST)", "--lr"],
    ],
    run_with_other_code: [
        ["source of megatron_ring", "def on ranks 0, 2-3 (HOST)", "abc on rank 1 (HOST)"],
        [
            "version of deepspeed",
            "DEEPSPEED on ranks 0-1, 3 (HOST)",
            "not installed on rank 2 (HOST)",
        ],
        ["commit", "9f3 on ranks 0, 2-3 (HOST)", "9f3+ on rank 1 (HOST)"],
    ],
    run_with_another_gpu: [
        ["stripe_size", "128 on ranks 0-1, 3 (HOST)", "1 on rank 2 (HOST)", "--stripe-size"],
    ],
    run_with_other_data: [
        ["size of tokens.bin", "6 bytes on ranks 0-2 (HOST)", "4 bytes on rank 3 (HOST)"],
    ],
    run_without_data: [["rank 3 (HOST)", "no tokens.bin"]],
    run_with_ring_in_another_order: [
        [
            "rank 0 (HOST, process PID)",
            "rank 2 (HOST, process PID) as the rank after it in its ring",
            "rank 1 (HOST, process PID)",
        ],
        [
            "rank 1 (HOST, process PID)",
            "rank 2 (HOST, process PID) as the rank before it in its ring",
            "rank 0 (HOST, process PID)",
        ],
        [
            "rank 1 (HOST, process PID)",
            "rank 3 (HOST, process PID) as the rank after it in its ring",
            "rank 2 (HOST, process PID)",
        ],
    ],
    run_with_another_group: [
        [
            "rank 0 (HOST, process PID)",
            "rank 2 (HOST, process PID) as member 1 of its tensor group",
            "rank 1 (HOST, process PID)",
        ],
    ],
    run_with_a_wrong_kernel: [["out is wrong on rank 1 (HOST)", "sdpa"]],
    run_with_an_operator_that_misreads_halves_of_heads: [
        ["dq is wrong on ranks 0-3 (HOST)", "sdpa"],
        ["dk is wrong on ranks 0-3 (HOST)", "sdpa"],
    ],
}


@contextlib.contextmanager
def patched(module, **attributes):
    """Replace attributes of a module for a while, as monkeypatch does, in a rank's process."""
    originals = {name: getattr(module, name) for name in attributes}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        module.__dict__.update(originals)


def run_faults(rank: int, world_size: int, folder: Path) -> dict[str, MegatronRingError]:
    consensus = Consensus.build()
    errors = {}
    for fault in FAULTS:
        with pytest.raises(MegatronRingError) as raised:
            fault(rank, consensus, folder)
        errors[fault.__name__] = raised.value
    return errors


@pytest.fixture(scope="module")
def raised_errors(tmp_path_factory) -> list[dict[str, MegatronRingError]]:
    """Return the error that each fault raised on each of four ranks."""
    return run_ranks(4, run_faults, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_raises_the_same_error_on_every_rank_and_names_the_ranks(fault, raised_errors):
    errors = [of_rank[fault.__name__] for of_rank in raised_errors]
    assert len({str(error) for error in errors}) == 1
    assert {error.exit_code for error in errors} == {3 if fault is run_without_data else 2}
    for problem, parts in zip(errors[0].problems, FAULTS[fault]):
        problem = problem.replace(socket.gethostname(), "HOST")
        problem = re.sub(r"process \d+", "process PID", problem)
        problem = problem.replace(version("deepspeed"), "DEEPSPEED")
        assert re.search(".*".join(map(re.escape, parts)), problem), problem
    assert len(errors[0].problems) >= len(FAULTS[fault])


# ---- links ----


def run_with_a_late_rank(rank: int, world_size: int) -> SelfTestReport:
    start = RingExchange.start

    def late(exchange: RingExchange, *arguments) -> object:
        time.sleep(0.02)
        return start(exchange, *arguments)

    if rank == 2:
        RingExchange.start = late
    return report_of(CONFIG, Consensus.build())


def test_a_rank_that_sends_late_is_at_one_end_of_the_slow_links():
    """It delays the rank that it sends to and often, receiving late, the one that sends to it."""
    (warning,) = (
        line
        for line in run_ranks(4, run_with_a_late_rank)[0].summary().splitlines()
        if line.startswith("slow links")
    )
    named = set(re.findall(r"(\d) -> (\d) \(", warning))
    assert {("2", "3")} <= named <= {("1", "2"), ("2", "3")}


def link(sender: int, receiver: int, rate: float, hosts: str = "aa") -> link_bandwidth.Link:
    return link_bandwidth.Link(
        ProcessId(sender, hosts[0], 1), ProcessId(receiver, hosts[1], 1), rate
    )


def test_a_link_between_hosts_is_compared_with_others_between_hosts():
    links = [
        link(0, 1, 100.0),
        link(1, 2, 9.0, "ab"),
        link(2, 3, 90.0, "bb"),
        link(3, 0, 10.0, "ba"),
    ]
    assert link_bandwidth.slow_links(links) == []
    weak = link(5, 6, 40.0, "bb")
    assert link_bandwidth.slow_links([*links, weak]) == [weak]
    assert link_bandwidth.slow_links([]) == []


def test_rates_are_printed_in_megabytes_with_two_digits_at_least():
    assert [link_bandwidth.megabytes(rate) for rate in (2.514e9, 15.6e6, 1.26e6, 40e3)] == [
        "2,514",
        "16",
        "1.3",
        "0.04",
    ]


def test_ranks_are_printed_as_ranges_and_many_hosts_as_a_count():
    processes = [ProcessId(rank, f"node{rank // 2}", 1) for rank in range(8)]
    assert describe_processes(processes[:3]) == "ranks 0-2 (node0, node1)"
    assert describe_processes([processes[0], processes[7]]) == "ranks 0, 7 (node0, node3)"
    assert describe_processes(processes) == "ranks 0-7 (4 hosts)"


# ---- the program ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a working directory with small.yaml and a prepared store, text/tokens."""
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


def two_ranks(folder: Path, flags_of: Callable[[int], list[str]]) -> list[tuple[int, str]]:
    """(exit code, output) of two ranks without a launcher."""
    port = free_port()
    ranks = [start_rank(rank, port, folder, flags_of(rank)) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]


def test_a_run_starts_with_the_summary_on_rank_0(folder):
    (code, output), (code_1, output_1) = two_ranks(folder, lambda rank: [])
    assert (code, code_1) == (0, 0), output + output_1
    assert output.count("self-test        2 ranks agree; ring = local attention to ") == 1
    assert output.index("self-test  ") < output.index("step  ")
    assert "self-test" not in output_1


def test_ranks_with_different_flags_exit_with_one_message(folder):
    # 66 is not a legal length for zigzag on two ranks; without the comparison, rank 1 would exit
    # before it joined.
    other = ["--context-parallel", "zigzag", "--seq-length", "66"]
    (code, output), (code_1, output_1) = two_ranks(folder, lambda rank: other if rank == 1 else [])
    assert (code, code_1) == (2, 2), output + output_1
    assert output.count("seq_length is not the same on all ranks: 64 on rank 0") == 1
    assert "Traceback" not in output + output_1
    assert "ConfigError" not in output_1


def test_the_self_test_alone_needs_no_data_and_prints_its_report(folder, tmp_path):
    without_data = SMALL.replace("data_path: [text/tokens], ", "")
    (tmp_path / "small.yaml").write_text(without_data)
    (code, output), (code_1, output_1) = two_ranks(tmp_path, lambda rank: ["--self-test"])
    assert (code, code_1) == (0, 0), output + output_1
    assert "where the grid has it: ranks 0-1 (" in output
    assert "hops             8,192 bytes; MB/s, the slowest first:" in output
    assert output.count("self-test        passed") == 1
    assert "self-test" not in output_1
    assert not (tmp_path / "data").exists(), "no corpus was prepared"
