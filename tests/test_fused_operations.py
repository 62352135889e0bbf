"""--fused-operations in the whole program on a CPU: what it says, what it trains, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.settings.setup import Setup
from megatron_ring.training.console import plan
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


def program(asked: str, *flags: str, folder: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        PROGRAM,
        "--config",
        "small.yaml",
        "--fused-operations",
        asked,
        *flags,
    ]
    return subprocess.run(
        map(str, command), cwd=folder, capture_output=True, text=True, timeout=300
    )


def losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def test_auto_trains_as_torch_does_and_both_say_once_who_computes(folder):
    reasons = {
        "auto": "liger, flash-attn, apex: for cuda alone, and this device is a cpu",
        "torch": "asked for",
    }
    for asked, reason in reasons.items():
        found = program(asked, "--metrics-file", f"{asked}.jsonl", folder=folder)
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("\noperations ") == 1
        assert (
            f"\noperations       torch for RMSNorm, RoPE, SwiGLU, cross entropy, AdamW: {reason}\n"
            in found.stdout
        )
    assert len(losses(folder / "torch.jsonl")) == 3
    assert losses(folder / "auto.jsonl") == losses(folder / "torch.jsonl")


def test_a_dry_run_says_it_too():
    said = plan(Setup.of(tiny.config(model={"activation": "gelu"}), 2))
    assert "\noperations       torch for RMSNorm, RoPE, cross entropy, AdamW: liger" in said


def test_a_vocabulary_that_is_split_is_called_so():
    said = plan(Setup.of(tiny.config(parallel={"tensor_model_parallel_size": 2}), 2))
    assert "cross entropy of a split vocabulary, AdamW: liger" in said


def test_a_library_that_cannot_be_had_ends_the_run_with_its_message_and_code(folder):
    found = program("apex", folder=folder)
    assert found.returncode == 5
    assert (
        "fused_operations apex is not to be had: for cuda alone, and this device is a cpu."
        in found.stderr
    )
    assert "Set --fused-operations auto or torch." in found.stderr
    assert "Traceback" not in found.stderr
