"""--deterministic: what it sets and refuses, and that two runs have the same bits."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ring.errors import ConfigError, KernelUnavailable
from megatron_ring.kernels.attention.registry import SUPPORT, Feature, Unsupported
from megatron_ring.parallel import entry_point
from megatron_ring.parallel.environment import fix_reduction_order
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training import entry
from tests.programs import PROGRAM, free_port, start_rank, working_folder
from tests.training import tiny

NONDETERMINISTIC = Path(__file__).with_name("nondeterministic_program.py")
COUNTING_REDUCTIONS = Path(__file__).with_name("counting_reductions.py")
SMALL = """\
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [0.9, 0.1], reset_attention_mask: true}
training: {train_iters: 4, lr_warmup_iters: 1, eval_interval: 2, eval_iters: 1, dtype: fp32}
logging: {straggler_threshold: 0}
"""
TIMED = {"tokens_per_second", "step_seconds", "data_seconds"}


@pytest.fixture
def environ(monkeypatch) -> dict[str, str]:
    """Return an environment of the test's own, empty at first."""
    monkeypatch.setattr(os, "environ", {})
    return os.environ


@pytest.fixture
def deterministic_mode(environ) -> Iterator[None]:
    entry.make_deterministic(is_rank_zero=False)
    yield
    torch.use_deterministic_algorithms(False)


def test_libraries_are_configured_by_the_environment(environ):
    fix_reduction_order()
    assert (environ["CUBLAS_WORKSPACE_CONFIG"], environ["NCCL_NVLS_ENABLE"]) == (":4096:8", "0")


def test_a_deterministic_setting_in_the_environment_is_kept(environ):
    environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    fix_reduction_order()
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_nondeterministic_settings_in_the_environment_are_refused_together(environ):
    environ.update(CUBLAS_WORKSPACE_CONFIG=":0:0", NCCL_NVLS_ENABLE="1")
    with pytest.raises(ConfigError) as refused:
        fix_reduction_order()
    first, second = refused.value.problems
    assert re.search(r"CUBLAS_WORKSPACE_CONFIG .*:4096:8 or :16:8.*:0:0.*--deterministic", first)
    assert re.search(r"NCCL_NVLS_ENABLE .*\b0\b.*\b1\b.*--deterministic", second)
    assert (environ["CUBLAS_WORKSPACE_CONFIG"], environ["NCCL_NVLS_ENABLE"]) == (":0:0", "1")


def test_a_nondeterministic_operator_is_named(deterministic_mode):
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert "operator put_ on" in str(entry_point.nondeterminism_error(raised.value))


def test_another_runtime_error_is_not_turned_into_a_user_error():
    assert entry_point.nondeterminism_error(RuntimeError("out of memory")) is None


@pytest.mark.parametrize("requested", ["auto", "sdpa"])
def test_auto_skips_a_nondeterministic_kernel_and_naming_it_is_an_error(requested, monkeypatch):
    monkeypatch.setitem(
        SUPPORT[Feature.DETERMINISM],
        ("sdpa", "cpu"),
        Unsupported("it adds at random", "Set another"),
    )
    parallel = {"attention_kernel": requested}
    assert RunSettings.resolve(tiny.config(parallel=parallel), 2).kernel.name == "sdpa"
    deterministic = tiny.config(parallel=parallel, training={"deterministic": True})
    if requested == "auto":
        assert RunSettings.resolve(deterministic, 2).kernel.name == "reference"
    else:
        with pytest.raises(KernelUnavailable, match="sdpa.*it adds at random"):
            RunSettings.resolve(deterministic, 2)


def test_cudnn_is_refused_on_cuda_for_its_unordered_gradients(monkeypatch):
    monkeypatch.setattr("megatron_ring.settings.run_settings.device_type", lambda: "cuda")
    sections = {"parallel": {"attention_kernel": "cudnn"}, "model": {"hidden_size": 256}}
    with pytest.raises(KernelUnavailable, match="cudnn .*bitwise determinism"):
        RunSettings.resolve(
            tiny.config(**sections, training={"dtype": "bf16", "deterministic": True}), 2
        )


def run(folder: Path, *flags: str, program: Path = PROGRAM) -> list[tuple[int, str]]:
    """Exit code and output of both ranks."""
    port = free_port()
    ranks = [
        start_rank(rank, port, folder, ["--self-test", "none", *flags], program) for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]


def metrics(file: Path) -> list[dict]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name not in TIMED} for record in records
    ]


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a checkpoint's tensors, by file."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return working_folder(tmp_path_factory.mktemp("twice"), SMALL)


@pytest.mark.whole
def test_two_runs_have_the_same_metrics_and_checkpoints_bit_for_bit(folder):
    for name in ("first", "again"):
        results = run(
            folder, "--deterministic", "--save", name, "--metrics-file", f"{name}/metrics.jsonl"
        )
        assert [code for code, _ in results] == [0, 0], results
        assert "".join(output for _, output in results).count("deterministic    bitwise") == 1
    first = folder / "first"
    again = folder / "again"
    assert len(metrics(first / "metrics.jsonl")) == 4 + 3
    assert metrics(first / "metrics.jsonl") == metrics(again / "metrics.jsonl")
    assert len(tensors(first)) > 0
    assert tensors(first) == tensors(again)


def test_a_nondeterministic_operator_ends_training_on_every_rank(folder):
    for code, output in run(folder, "--deterministic", program=NONDETERMINISTIC):
        assert code == ConfigError.exit_code
        assert output.count("no deterministic version of its operator put_") == 1
        assert "Traceback" not in output


@pytest.mark.whole
def test_the_selected_reduction_is_the_one_that_runs(folder):
    """Assert which code ran, not the bits: a processor may round both orders to the same."""
    flags = "--stripe-size", "1", "--context-parallel-reduction"
    for reduction, other in (("arrival", "invariant"), ("invariant", "arrival")):
        metrics_file = f"{reduction}/metrics.jsonl"
        results = run(
            folder, *flags, reduction, "--metrics-file", metrics_file, program=COUNTING_REDUCTIONS
        )
        assert [code for code, _ in results] == [0, 0], results
        for _, output in results:
            passes = dict(
                re.findall(r"(arrival|invariant) (\d+)", output.split("forward passes:")[1])
            )
            assert int(passes[reduction]) > 0
            assert int(passes[other]) == 0
    by_hops, by_blocks = (
        metrics(folder / name / "metrics.jsonl") for name in ("arrival", "invariant")
    )
    for first, second in zip(by_hops, by_blocks, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
