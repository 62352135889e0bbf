"""--fused-operations in the whole program on a CPU: console lines, losses and refusals."""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.console import plan
from tests import forked
from tests.programs import PROGRAM, working_folder
from tests.training import tiny

SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
data: {data_path: [text/tokens], seq_length: 64, split: [0.9, 0.1]}
training: {train_iters: 3, lr_warmup_iters: 1, eval_interval: 0, dtype: fp32}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


def run_program(library: str, *flags: str, folder: Path) -> subprocess.CompletedProcess:
    options = ["--config", "small.yaml", "--fused-operations", library, *flags]
    return forked.run([PROGRAM, *options], folder)


def losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def test_auto_equals_torch_on_a_cpu_and_both_print_the_choice_once(folder):
    for library, reason in {"auto": "CUDA only", "torch": "requested"}.items():
        run = run_program(library, "--metrics-file", f"{library}.jsonl", folder=folder)
        assert run.returncode == 0, run.stderr
        (line,) = (line for line in run.stdout.splitlines() if line.startswith("operations "))
        assert "torch for RMSNorm, RoPE, SwiGLU, cross entropy, AdamW: " in line
        assert reason in line
    assert len(losses(folder / "torch.jsonl")) == 3
    assert losses(folder / "auto.jsonl") == losses(folder / "torch.jsonl")


def test_a_dry_run_prints_the_choice():
    text = plan(RunSettings.resolve(tiny.config(model={"activation": "gelu"}), 2))
    assert "\noperations       torch for RMSNorm, RoPE, cross entropy, AdamW: triton" in text


def test_a_split_vocabulary_is_named_in_the_choice():
    text = plan(RunSettings.resolve(tiny.config(parallel={"tensor_model_parallel_size": 2}), 2))
    assert "cross entropy of a split vocabulary, AdamW: triton" in text


def test_an_unavailable_library_ends_the_run_with_exit_code_5(folder):
    run = run_program("apex", folder=folder)
    assert run.returncode == 5
    assert "fused_operations apex is unavailable: CUDA only" in run.stderr
    assert "Set --fused-operations auto or torch." in run.stderr
    assert "Traceback" not in run.stderr
