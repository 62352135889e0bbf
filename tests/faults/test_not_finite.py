"""The whole program with a non-finite loss or gradient on one rank: message and continuation."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from tests.faults.poisoned import Poison
from tests.programs import PROGRAM, free_port, start_rank, working_folder

pytestmark = pytest.mark.whole

POISONED = Path(__file__).with_name("poisoned.py")
SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [1.0, 0.0]}
training: {train_iters: 6, lr_warmup_iters: 1, eval_interval: 0, dtype: fp32}
checkpoint: {save: saved, load: saved, save_interval: 2}
logging: {metrics_file: metrics.jsonl}
"""
NODE = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Return a folder with a config and a store, without output of a run."""
    return working_folder(tmp_path_factory.mktemp("untouched"), SMALL)


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "work")


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory) -> list[float]:
    """Return the losses of a run without a bad step."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("undisturbed") / "work")
    assert run(folder)[0] == [0, 0]
    return losses(folder)


def run(folder: Path, *flags: str, poison: Poison | None = None) -> tuple[list[int], str]:
    """Return the exit codes and the output of two ranks."""
    port = free_port()
    variables = poison.environment() if poison else {}
    program = POISONED if poison else PROGRAM
    ranks = [
        start_rank(rank, port, folder, ["--self-test", "none", *flags], program, **variables)
        for rank in (0, 1)
    ]
    output = "".join(rank.communicate(timeout=120)[0] for rank in ranks)
    assert "Traceback" not in output
    return [rank.returncode for rank in ranks], output


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [step["loss"] for step in metrics(folder)]


def test_stop_names_the_rank_and_the_same_command_continues_as_undisturbed(folder, undisturbed):
    codes, output = run(folder, "--on-bad-step", "stop", poison=Poison("nan loss", (3,)))
    assert codes == [6, 6]
    assert output.count("Diverged") == 1
    bad = "step 3, of samples 2 to 2, is bad: its loss is nan"
    assert re.search(rf"{bad}\n.*rank 1 \({NODE}\).*loss.*\n", output)
    assert "--load saved continues from step-00000002" in output
    assert losses(folder) == [*undisturbed[:2], None]
    assert run(folder, "--on-bad-step", "stop")[0] == [0, 0]
    assert losses(folder) == undisturbed


def test_skip_is_the_default_and_leaves_the_step_out(folder, undisturbed):
    codes, output = run(folder, poison=Poison("nan gradient", (3,)))
    assert codes == [0, 0]
    bad = "step 3, .* gradient norm is inf; .*rank 1 .*gradient.* layer 0.*; .*skipped"
    assert len(re.findall(bad, output)) == 1
    assert "bad steps        1 skipped, 0 followed by a roll back" in output
    steps = metrics(folder)
    assert [step["skipped_steps"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["tokens"] for step in steps] == [64, 128, 192, 256, 320, 384]
    assert losses(folder)[:2] == undisturbed[:2]
    assert steps[2]["grad_norm"] is None
    assert losses(folder)[2] == undisturbed[2], "only the gradient was bad"
    assert None not in losses(folder)
    assert losses(folder)[3] != undisturbed[3]


def test_roll_back_loads_the_newest_checkpoint_and_reads_the_following_samples(folder, undisturbed):
    codes, output = run(folder, "--on-bad-step", "roll-back", poison=Poison("infinite loss", (4,)))
    assert codes == [0, 0]
    assert (
        len(re.findall("step 4, .* is bad: .*; rolled back to saved/step-00000002,", output)) == 1
    )
    steps = metrics(folder)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["roll_backs"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["tokens"] // 64 for step in steps] == [1, 2, 5, 6, 7, 8], (
        "the samples of steps 3 and 4 are left out"
    )
    assert losses(folder)[:2] == undisturbed[:2]
    assert losses(folder)[2] != undisturbed[2]


BAD_FROM_3 = Poison("nan gradient", (3, 4, 5, 6))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saved").glob("step-*"))


def test_checkpoints_without_a_good_step_do_not_reset_the_count_of_bad_steps(folder):
    codes, output = run(folder, "--max-bad-steps", "3", "--keep-last", "1", poison=BAD_FROM_3)
    assert codes == [6, 6]
    assert output.count("Diverged") == 1
    assert output.count("new run") == 1
    assert len(re.findall("no checkpoint after step 4", output)) == 1
    assert checkpoints(folder) == ["step-00000002"]


@pytest.mark.parametrize("flags", [(), ("--async-save",)])
def test_a_last_checkpoint_with_only_bad_steps_before_it_deletes_no_older_one(folder, flags):
    codes, _ = run(folder, "--keep-last", "1", *flags, poison=BAD_FROM_3)
    assert codes == [0, 0]
    assert checkpoints(folder) == ["step-00000002", "step-00000006"]
    assert run(folder, "--train-iters", "8", "--keep-last", "1")[0] == [0, 0]
    assert checkpoints(folder) == ["step-00000008"]
