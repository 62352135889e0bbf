"""The program started by deepspeed and by itself: its files, its messages, its exit codes.

What does not depend on the launcher is tested in forked processes (forked.py).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.config import load_yaml
from tests.forked import Forked
from tests.forked import run as run_forked
from tests.programs import PROGRAM, free_port, start_rank, working_folder

BIN = Path(sys.executable).parent
SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
data: {seq_length: 64, split: [0.7, 0.15, 0.15]}
training: {train_iters: 4, lr_warmup_iters: 1, eval_interval: 2, eval_iters: 1, dtype: fp32}
"""


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess:
    process = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=300
    )
    process.output = process.stdout + process.stderr
    return process


def alone(*flags: str | Path, folder: Path) -> subprocess.CompletedProcess:
    return run(sys.executable, PROGRAM, *flags, folder=folder)


def by_deepspeed(*flags: str | Path, ranks: int, folder: Path) -> subprocess.CompletedProcess:
    launcher = [BIN / "deepspeed", "--master_port", free_port(), "--num_gpus", str(ranks)]
    return run(*launcher, PROGRAM, *flags, folder=folder)


def forked(*flags: str, ranks: int, folder: Path, config: str = "small.yaml") -> str:
    """Return the output of ranks without a launcher; they must succeed."""
    port = free_port()
    started = [
        start_rank(
            rank,
            port,
            folder,
            flags,
            config=config,
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
        )
        for rank in range(ranks)
    ]
    output = "".join(rank.communicate(timeout=200)[0] for rank in started)
    assert [rank.returncode for rank in started] == [0] * ranks, output
    return output


def run_one_process(*flags: str, folder: Path) -> tuple[int, str]:
    """Return the exit code and the stderr of one process; there must be no traceback."""
    process = Forked(
        [str(PROGRAM), "--config", "small.yaml", *flags], folder, os.environ, subprocess.PIPE
    )
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in out + err
    return process.returncode, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a working directory with small.yaml and a prepared store, text/tokens."""
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


@pytest.fixture(scope="module")
def trained(folder) -> subprocess.CompletedProcess:
    """Train four steps on two striped ranks under deepspeed, with a checkpoint every two."""
    flags = [
        "--config", "small.yaml", "--context-parallel", "striped", "--data-path", "text/tokens",
        "--save", "saved", "--save-interval", "2", "--metrics-file", "out/metrics.jsonl",
    ]  # fmt: skip
    return by_deepspeed(*flags, ranks=2, folder=folder)


def metrics(folder: Path, file: str = "out/metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def test_two_ranks_train_and_print_their_settings_and_output_paths(trained, folder):
    assert trained.returncode == 0, trained.output
    assert "UserWarning" not in trained.output
    for line in (
        "grid             2 processes = "
        "1 pipe x 1 data x 2 context (2 ring x 1 ulysses) x 1 tensor",
        "layout           striped, stripe size 1 (auto: single tokens, because wider stripes, "
        "fastest with sdpa, need samples of a multiple of 512 tokens on 2 ring ranks, not 64), "
        "64 tokens, 32 on each ring rank",
        "dtype            fp32: ",
        "attention        sdpa: ",
        "checkpoint       saved/step-00000004",
        "metrics          out/metrics.jsonl",
        "loss plot        out/loss.png",
    ):
        assert trained.stdout.count(line) == 1, line
    assert (folder / "out" / "loss.png").stat().st_size > 1000


def test_the_metrics_file_has_its_public_keys(trained, folder):
    steps = [record for record in metrics(folder) if "loss" in record]
    validations = [record for record in metrics(folder) if "validation_loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["step"] for record in validations] == [0, 2, 4]
    public = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds"}
    assert all(public <= set(record) for record in steps)
    assert all(
        set(record) == {"step", "validation_loss", "validation_bits_per_byte"}
        for record in validations
    )
    assert [record["tokens"] for record in steps] == [64, 128, 192, 256]


def test_the_test_split_is_evaluated_once_after_the_last_step(trained, folder):
    *_, validation, test = metrics(folder)
    assert set(test) == {"step", "test_loss", "test_bits_per_byte"}
    assert test["step"] == 4
    assert test["test_loss"] != validation["validation_loss"], "the splits differ"
    assert [name for record in metrics(folder) for name in record].count("test_loss") == 1
    assert f"step      4  test loss {test['test_loss']:.4f}, " in trained.stdout


def test_the_resolved_config_in_the_checkpoint_can_be_loaded(trained, folder):
    saved = load_yaml(folder / "saved" / "step-00000004" / "config.yaml")
    assert saved.parallel.context_parallel == "striped"
    assert saved.model.hidden_size == 32


def test_a_resumed_run_continues_after_the_checkpoint_s_step(trained, folder):
    first = metrics(folder)
    flags = ["--load", "saved", "--train-iters", "6", "--lr-decay-style", "constant"]
    output = forked(*flags, ranks=2, folder=folder, config="saved/step-00000004/config.yaml")
    assert "resuming         saved/step-00000004, 4 steps done" in output
    assert metrics(folder)[: len(first)] == first
    assert [record["step"] for record in metrics(folder) if "test_loss" in record] == [4, 6]
    assert [record["step"] for record in metrics(folder) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def copy_store(folder: Path, name: str, change: Callable[[bytes], bytes] = bytes) -> str:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"text/tokens{suffix}", folder / f"text/{name}{suffix}")
    path = folder / f"text/{name}.bin"
    path.write_bytes(change(path.read_bytes()))
    return f"text/{name}"


def test_a_resume_accepts_moved_data_and_needs_a_flag_for_other_data(trained, folder):
    moved = copy_store(folder, "moved")
    rewritten = copy_store(folder, "rewritten", lambda content: content[2048:] + content[:2048])
    resume = [
        "--load", "saved", "--train-iters", "5",
        "--lr-decay-style", "constant", "--eval-interval", "0",
    ]  # fmt: skip
    code, output = run_one_process(*resume, "--data-path", rewritten, folder=folder)
    assert code == 4
    assert rewritten in output
    assert "text/tokens" in output
    assert "--allow-other-data" in output
    for flags in ([moved], [rewritten, "--allow-other-data"]):
        code, output = run_one_process(*resume, "--data-path", *flags, folder=folder)
        assert code == 0, output


def test_tensor_and_pipeline_ranks_resume_bit_for_bit_without_warnings(folder):
    flags = [
        "--context-parallel", "striped", "--data-path", "text/tokens", "--num-layers", "2",
        "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--pipeline-model-parallel-size", "2", "--global-batch-size", "2", "--recompute", "full",
        "--lr-decay-style", "constant", "--save", "axes", "--eval-interval", "0",
    ]  # fmt: skip
    uninterrupted = [*flags, "--save-interval", "2", "--metrics-file", "axes/uninterrupted.jsonl"]
    resumed = [*flags, "--load", "axes", "--metrics-file", "axes/resumed.jsonl"]
    for run_flags in (uninterrupted, resumed):
        assert "UserWarning" not in forked(*run_flags, ranks=4, folder=folder)
        shutil.rmtree(folder / "axes" / "step-00000004")
    expected, actual = (
        [
            (record["step"], record["loss"], record["grad_norm"])
            for record in metrics(folder, file)
            if "loss" in record
        ]
        for file in ("axes/uninterrupted.jsonl", "axes/resumed.jsonl")
    )
    assert [step for step, *_ in expected] == [1, 2, 3, 4]
    assert actual == expected[2:]
    tests = [
        metrics(folder, file)[-1] for file in ("axes/uninterrupted.jsonl", "axes/resumed.jsonl")
    ]
    assert tests[0]["test_loss"] > 0, "evaluated without validation"
    assert tests[0] == tests[1]


def test_one_process_needs_no_launcher(folder):
    flags = ["--data-path", "text/tokens", "--context-parallel", "striped"]
    process = alone("--config", "small.yaml", *flags, folder=folder)
    assert process.returncode == 0, process.output


def test_a_dry_run_prints_the_config_the_grid_and_the_layout(folder):
    flags = [
        "--context-parallel", "striped", "--world-size", "4",
        "--context-parallel-size", "2", "--dry-run",
    ]  # fmt: skip
    process = run_forked([PROGRAM, "--config", "small.yaml", *flags], folder)
    assert process.returncode == 0, process.stderr
    assert "hidden_size: 32" in process.stdout
    assert "    3        0        1        1        0        0" in process.stdout
    assert "ring rank 0  #.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#." in process.stdout
    assert re.search("^bytes of a hop   8,192 forward .*backward .*16,384", process.stdout, re.M)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--seq-length", "65"], 2, "seq_length 65"),
        (["--num-layer", "3"], 2, "--num-layers"),
        (["--data-path", "text/nothing"], 3, "text/nothing"),
        (["--load", "nowhere"], 4, "load nowhere does not exist. Set --load"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_has_one_message_its_exit_code_and_no_traceback(folder, flags, code, message):
    options = {"--data-path": "text/tokens", "--context-parallel": "zigzag"} | {flags[0]: flags[1]}
    exit_code, output = run_one_process(
        *(part for pair in options.items() for part in pair), folder=folder
    )
    assert exit_code == code, output
    assert message in output


def test_bad_input_on_two_ranks_is_printed_once_and_ends_both_with_its_exit_code(folder):
    flags = ["--context-parallel", "zigzag", "--seq-length", "66"]
    port = free_port()
    ranks = [start_rank(rank, port, folder, flags) for rank in range(2)]
    output = "".join(rank.communicate(timeout=200)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], output
    assert len(re.findall("seq_length 66 .*zigzag .*2 ring ranks", output)) == 1


@pytest.mark.exhaustive
def test_bad_input_under_a_launcher_is_printed_once_with_its_exit_code(folder):
    flags = ["--config", "small.yaml", "--context-parallel", "zigzag", "--seq-length", "66"]
    process = by_deepspeed(*flags, ranks=2, folder=folder)
    assert process.returncode == 2, process.output
    assert len(re.findall("seq_length 66 .*zigzag .*2 ring ranks", process.output)) == 1


def test_a_checkpoint_of_another_model_is_refused_with_both_sizes(trained, folder):
    code, output = run_one_process(
        "--data-path", "text/tokens", "--load", "saved", "--num-layers", "2", folder=folder
    )
    assert code == 4, output
    assert re.search("num_layers 1 .*2 .*--num-layers", output)
