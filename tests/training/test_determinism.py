"""--deterministic: what it sets, whom it refuses, and that the whole program gives the same bits twice."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ring.errors import ConfigError, KernelUnavailable
from megatron_ring.kernels.attention.support import SUPPORT, Feature, Unsupported
from megatron_ring.parallel.environment import fix_order_of_sums
from megatron_ring.settings.setup import Setup
from megatron_ring.training import entry
from tests.programs import PROGRAM, free_port, start_rank, working_folder
from tests.training import tiny

UNREPEATABLE = Path(__file__).with_name("unrepeatable.py")
COUNTED = Path(__file__).with_name("counted_reductions.py")
SMALL = """\
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [0.9, 0.1], reset_attention_mask: true}
training: {train_iters: 4, lr_warmup_iters: 1, eval_interval: 2, eval_iters: 1, dtype: fp32}
logging: {straggler_threshold: 0}
"""
OF_THE_CLOCK = {"tokens_per_second", "step_seconds", "data_seconds"}


@pytest.fixture
def environ(monkeypatch) -> dict[str, str]:
    """An environment of the test's own, empty at first."""
    monkeypatch.setattr(os, "environ", {})
    return os.environ


@pytest.fixture
def begun(environ) -> Iterator[None]:
    entry.make_deterministic(is_rank_zero=False)
    yield
    torch.use_deterministic_algorithms(False)


def test_libraries_are_told_by_the_environment(environ):
    fix_order_of_sums()
    assert (environ["CUBLAS_WORKSPACE_CONFIG"], environ["NCCL_NVLS_ENABLE"]) == (":4096:8", "0")


def test_what_the_environment_says_already_is_kept_where_it_repeats_itself(environ):
    environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    fix_order_of_sums()
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_what_the_environment_says_otherwise_is_refused_all_at_once(environ):
    environ.update(CUBLAS_WORKSPACE_CONFIG=":0:0", NCCL_NVLS_ENABLE="1")
    with pytest.raises(ConfigError) as refused:
        fix_order_of_sums()
    assert refused.value.problems == [
        "deterministic needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, and the environment has :0:0. "
        "Unset CUBLAS_WORKSPACE_CONFIG, or leave --deterministic out.",
        "deterministic needs NCCL_NVLS_ENABLE to be 0, and the environment has 1. "
        "Unset NCCL_NVLS_ENABLE, or leave --deterministic out.",
    ]
    assert (environ["CUBLAS_WORKSPACE_CONFIG"], environ["NCCL_NVLS_ENABLE"]) == (":0:0", "1")


def test_an_operator_that_does_not_repeat_itself_is_named(begun):
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert "operator put_ on" in str(entry.nondeterminism_error(raised.value))


def test_another_error_is_none_of_its_business():
    assert entry.nondeterminism_error(RuntimeError("out of memory")) is None


@pytest.mark.parametrize("asked", ["auto", "sdpa"])
def test_a_kernel_that_does_not_repeat_itself_is_passed_over_or_refused(asked, monkeypatch):
    monkeypatch.setitem(
        SUPPORT[Feature.DETERMINISM],
        ("sdpa", "cpu"),
        Unsupported("it adds at random", "Set another"),
    )
    parallel = {"attention_kernel": asked}
    assert Setup.of(tiny.config(parallel=parallel), 2).kernel.name == "sdpa"
    deterministic = tiny.config(parallel=parallel, training={"deterministic": True})
    if asked == "auto":
        assert Setup.of(deterministic, 2).kernel.name == "reference"
    else:
        with pytest.raises(
            KernelUnavailable, match="cannot do the same bits every time: it adds at random"
        ):
            Setup.of(deterministic, 2)


def test_on_cuda_cudnn_is_refused(monkeypatch):
    monkeypatch.setattr("megatron_ring.settings.setup.device_type", lambda: "cuda")
    asked = {"parallel": {"attention_kernel": "cudnn"}, "model": {"hidden_size": 256}}
    with pytest.raises(KernelUnavailable, match="cannot do the same bits every time"):
        Setup.of(tiny.config(**asked, training={"dtype": "bf16", "deterministic": True}), 2)


def run(folder: Path, *flags: str, program: Path = PROGRAM) -> list[tuple[int, str]]:
    """Exit code and words of both ranks."""
    port = free_port()
    ranks = [
        start_rank(rank, port, folder, ["--self-test", "none", *flags], program) for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    return [(rank.returncode, words) for rank, words in zip(ranks, said)]


def metrics(file: Path) -> list[dict]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name not in OF_THE_CLOCK}
        for record in records
    ]


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensors, by file."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return working_folder(tmp_path_factory.mktemp("twice"), SMALL)


@pytest.mark.whole
def test_the_whole_program_gives_the_same_bits_twice(folder):
    for name in ("first", "again"):
        ended = run(
            folder, "--deterministic", "--save", name, "--metrics-file", f"{name}/metrics.jsonl"
        )
        assert [code for code, _ in ended] == [0, 0], ended
        assert "".join(words for _, words in ended).count("deterministic    bitwise") == 1
    first, again = folder / "first", folder / "again"
    assert len(metrics(first / "metrics.jsonl")) == 4 + 3
    assert metrics(first / "metrics.jsonl") == metrics(again / "metrics.jsonl")
    assert len(tensors(first)) > 0
    assert tensors(first) == tensors(again)


def test_training_ends_on_every_rank_at_an_operator_that_does_not_repeat_itself(folder):
    for code, words in run(folder, "--deterministic", program=UNREPEATABLE):
        assert code == ConfigError.exit_code
        assert words.count("no deterministic version of its operator put_") == 1
        assert "Traceback" not in words


@pytest.mark.whole
def test_the_reduction_that_is_asked_for_is_the_one_that_runs(folder):
    """Which code ran is asserted, not the bits: a processor may round both orders alike."""
    flags = "--stripe-size", "1", "--context-parallel-reduction"
    for reduction, other in (("arrival", "invariant"), ("invariant", "arrival")):
        metrics_file = f"{reduction}/metrics.jsonl"
        ended = run(folder, *flags, reduction, "--metrics-file", metrics_file, program=COUNTED)
        assert [code for code, _ in ended] == [0, 0], ended
        for _, output in ended:
            passes = dict(
                re.findall(r"(arrival|invariant) (\d+)", output.split("forward passes:")[1])
            )
            assert int(passes[reduction]) > 0
            assert int(passes[other]) == 0
    by_hops, by_blocks = (
        metrics(folder / name / "metrics.jsonl") for name in ("arrival", "invariant")
    )
    for one, other in zip(by_hops, by_blocks, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
