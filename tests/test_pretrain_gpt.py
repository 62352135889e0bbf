"""The program as people start it, by deepspeed and alone: its files, its messages, its exit codes.

What does not depend on who has started it is asked of forked processes (forked.py).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.config import load_yaml
from tests.forked import Forked
from tests.programs import PROGRAM, free_port, start_rank, working_folder

BIN = Path(sys.executable).parent
SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
data: {seq_length: 64, split: [0.7, 0.15, 0.15]}
training: {train_iters: 4, lr_warmup_iters: 1, eval_interval: 2, eval_iters: 1, dtype: fp32}
"""


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess:
    found = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=300
    )
    found.said = found.stdout + found.stderr
    return found


def alone(*flags: str | Path, folder: Path) -> subprocess.CompletedProcess:
    return run(sys.executable, PROGRAM, *flags, folder=folder)


def by_deepspeed(*flags: str | Path, ranks: int, folder: Path) -> subprocess.CompletedProcess:
    launcher = [BIN / "deepspeed", "--master_port", free_port(), "--num_gpus", str(ranks)]
    return run(*launcher, PROGRAM, *flags, folder=folder)


def forked(*flags: str, ranks: int, folder: Path, config: str = "small.yaml") -> str:
    """What ranks say that start without a launcher and end well."""
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
    said = "".join(rank.communicate(timeout=200)[0] for rank in started)
    assert [rank.returncode for rank in started] == [0] * ranks, said
    return said


def refused(*flags: str, folder: Path) -> tuple[int, str]:
    """The exit code of one process, and what it says on stderr; on stdout there is no traceback either."""
    process = Forked(
        [str(PROGRAM), "--config", "small.yaml", *flags], folder, os.environ, subprocess.PIPE
    )
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in out + err
    return process.returncode, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with small.yaml and a prepared store, text/tokens."""
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


@pytest.fixture(scope="module")
def trained(folder) -> subprocess.CompletedProcess:
    """Two striped ranks under deepspeed for four steps, a checkpoint every two."""
    return by_deepspeed(
        "--config", "small.yaml", "--context-parallel", "striped", "--data-path", "text/tokens",
        "--save", "saved", "--save-interval", "2", "--metrics-file", "out/metrics.jsonl", ranks=2, folder=folder,
    )  # fmt: skip


def metrics(folder: Path, file: str = "out/metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def test_two_ranks_train_and_say_what_was_chosen_and_where_everything_is(trained, folder):
    assert trained.returncode == 0, trained.said
    assert "UserWarning" not in trained.said
    for said in (
        "grid             2 processes = 1 pipe x 1 data x 2 context (2 ring x 1 ulysses) x 1 tensor",
        "layout           striped, 64 tokens, 32 on each ring rank",
        "dtype            fp32: asked for",
        "attention        sdpa: ",
        "checkpoint       saved/step-00000004",
        "metrics          out/metrics.jsonl",
        "loss plot        out/loss.png",
    ):
        assert trained.stdout.count(said) == 1, said
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


def test_the_test_text_is_evaluated_once_after_the_last_step(trained, folder):
    *_, validation, test = metrics(folder)
    assert set(test) == {"step", "test_loss", "test_bits_per_byte"}
    assert test["step"] == 4
    assert test["test_loss"] != validation["validation_loss"], "another text"
    assert [name for record in metrics(folder) for name in record].count("test_loss") == 1
    assert f"step      4  test loss {test['test_loss']:.4f}, " in trained.stdout


def test_the_resolved_config_lies_in_the_checkpoint_and_is_a_config(trained, folder):
    saved = load_yaml(folder / "saved" / "step-00000004" / "config.yaml")
    assert saved.parallel.context_parallel == "striped"
    assert saved.model.hidden_size == 32


def test_a_run_goes_on_where_its_checkpoint_was(trained, folder):
    first = metrics(folder)
    flags = ["--load", "saved", "--train-iters", "6", "--lr-decay-style", "constant"]
    said = forked(*flags, ranks=2, folder=folder, config="saved/step-00000004/config.yaml")
    assert "resuming         saved/step-00000004, 4 steps done" in said
    assert metrics(folder)[: len(first)] == first
    assert [record["step"] for record in metrics(folder) if "test_loss" in record] == [4, 6]
    assert [record["step"] for record in metrics(folder) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def copied_store(folder: Path, name: str, tokens: Callable[[bytes], bytes] = bytes) -> str:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"text/tokens{suffix}", folder / f"text/{name}{suffix}")
    path = folder / f"text/{name}.bin"
    path.write_bytes(tokens(path.read_bytes()))
    return f"text/{name}"


def test_a_run_is_resumed_on_the_same_data_anywhere_and_on_other_data_only_by_a_flag(
    trained, folder
):
    moved = copied_store(folder, "moved")
    rewritten = copied_store(folder, "rewritten", lambda content: content[2048:] + content[:2048])
    resumed = [
        "--load",
        "saved",
        "--train-iters",
        "5",
        "--lr-decay-style",
        "constant",
        "--eval-interval",
        "0",
    ]
    code, said = refused(*resumed, "--data-path", rewritten, folder=folder)
    assert code == 4
    assert f"token store {rewritten}: not read there" in said
    assert "token store text/tokens: " in said
    assert "--allow-other-data" in said
    for flags in ([moved], [rewritten, "--allow-other-data"]):
        code, said = refused(*resumed, "--data-path", *flags, folder=folder)
        assert code == 0, said


def test_tensor_x_pipeline_ranks_go_on_where_they_were_and_stay_quiet(folder):
    flags = [
        "--context-parallel", "striped", "--data-path", "text/tokens", "--num-layers", "2",
        "--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2",
        "--global-batch-size", "2", "--recompute", "full", "--lr-decay-style", "constant", "--save", "axes",
        "--eval-interval", "0",
    ]  # fmt: skip
    straight = [*flags, "--save-interval", "2", "--metrics-file", "axes/straight.jsonl"]
    resumed = [*flags, "--load", "axes", "--metrics-file", "axes/resumed.jsonl"]
    for run in (straight, resumed):
        assert "UserWarning" not in forked(*run, ranks=4, folder=folder)
        shutil.rmtree(folder / "axes" / "step-00000004")
    expected, found = (
        [
            (record["step"], record["loss"], record["grad_norm"])
            for record in metrics(folder, file)
            if "loss" in record
        ]
        for file in ("axes/straight.jsonl", "axes/resumed.jsonl")
    )
    assert [step for step, *_ in expected] == [1, 2, 3, 4]
    assert found == expected[2:]
    tests = [metrics(folder, file)[-1] for file in ("axes/straight.jsonl", "axes/resumed.jsonl")]
    assert tests[0]["test_loss"] > 0, "evaluated though nothing is validated"
    assert tests[0] == tests[1]


def test_one_process_needs_no_launcher(folder):
    found = alone(
        "--config",
        "small.yaml",
        "--data-path",
        "text/tokens",
        "--context-parallel",
        "striped",
        folder=folder,
    )
    assert found.returncode == 0, found.said


def test_a_dry_run_prints_the_config_the_grid_and_the_layout(folder):
    flags = [
        "--context-parallel",
        "striped",
        "--world-size",
        "4",
        "--context-parallel-size",
        "2",
        "--dry-run",
    ]
    found = alone("--config", "small.yaml", *flags, folder=folder)
    assert found.returncode == 0, found.said
    assert "hidden_size: 32" in found.stdout
    assert "    3        0        1        1        0        0" in found.stdout
    assert "ring rank 0  #.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#." in found.stdout
    assert "bytes of a hop   8,192 forward (K and V)" in found.stdout
    assert "backward (the queries travel; the keys would be 16,384)" in found.stdout


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--seq-length", "65"], 2, "seq_length 65 cannot be laid out zigzag on 1 ring ranks"),
        (["--num-layer", "3"], 2, "--num-layers"),
        (["--data-path", "text/nothing"], 3, "text/nothing"),
        (["--load", "nowhere"], 4, "load nowhere does not exist. Set --load"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_gives_one_message_its_own_exit_code_and_no_traceback(
    folder, flags, code, message
):
    wanted = {"--data-path": "text/tokens", "--context-parallel": "zigzag"} | {flags[0]: flags[1]}
    found, said = refused(*(part for pair in wanted.items() for part in pair), folder=folder)
    assert (found, message in said) == (code, True), said


def test_bad_input_under_a_launcher_is_said_once_and_its_code_is_passed_on(folder):
    found = by_deepspeed("--config", "small.yaml", "--context-parallel", "zigzag", "--seq-length", "66", ranks=2,
                         folder=folder)  # fmt: skip
    assert found.returncode == 2, found.said
    assert found.said.count("seq_length 66 cannot be laid out zigzag on 2 ring ranks") == 1


def test_a_checkpoint_of_another_model_is_refused_size_by_size(trained, folder):
    code, said = refused(
        "--data-path", "text/tokens", "--load", "saved", "--num-layers", "2", folder=folder
    )
    assert code == 4, said
    assert "num_layers 1 there, 2 here. Set --num-layers." in said
