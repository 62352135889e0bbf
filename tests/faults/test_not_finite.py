"""The whole program, one rank of which computes something that is not finite: what is said, and how the run goes on."""

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
def untouched(tmp_path_factory) -> Path:
    """A folder with a store, in which no run has been."""
    return working_folder(tmp_path_factory.mktemp("untouched"), SMALL)


@pytest.fixture
def folder(untouched, tmp_path) -> Path:
    return shutil.copytree(untouched, tmp_path / "work")


@pytest.fixture(scope="module")
def quiet(untouched, tmp_path_factory) -> list[float]:
    """The losses of a run that nothing happens to."""
    folder = shutil.copytree(untouched, tmp_path_factory.mktemp("quiet") / "work")
    assert run(folder)[0] == [0, 0]
    return losses(folder)


def run(folder: Path, *flags: str, poison: Poison | None = None) -> tuple[list[int], str]:
    """Exit codes of two ranks, and all that they said."""
    port, variables = free_port(), poison.environment() if poison else {}
    program = POISONED if poison else PROGRAM
    ranks = [
        start_rank(rank, port, folder, ["--self-test", "none", *flags], program, **variables)
        for rank in (0, 1)
    ]
    said = "".join(rank.communicate(timeout=120)[0] for rank in ranks)
    assert "Traceback" not in said
    return [rank.returncode for rank in ranks], said


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [step["loss"] for step in metrics(folder)]


def test_stop_names_the_rank_and_the_same_command_goes_on_as_if_nothing_had_happened(folder, quiet):
    codes, said = run(folder, "--on-bad-step", "stop", poison=Poison("nan loss", (3,)))
    assert codes == [6, 6]
    assert said.count("Diverged") == 1
    bad = "step 3, of samples 2 to 2, is bad: its loss is nan"
    assert re.search(rf"{bad}\nit began on rank 1 \({NODE}\), in the loss itself\n", said)
    assert "--load saved continues from step-00000002" in said
    assert losses(folder) == [*quiet[:2], None]
    assert run(folder, "--on-bad-step", "stop")[0] == [0, 0]
    assert losses(folder) == quiet


def test_skip_leaves_the_step_out_and_is_what_a_run_does_that_was_not_told(folder, quiet):
    codes, said = run(folder, poison=Poison("nan gradient", (3,)))
    assert codes == [0, 0]
    bad = "step 3, .* is bad: its gradient norm is inf; it began on rank 1 .*, in the gradient of what layer 0 gave"
    assert len(re.findall(f"{bad}; it is skipped", said)) == 1
    assert "bad steps        1 skipped, 0 followed by a roll back" in said
    steps = metrics(folder)
    assert [step["skipped_steps"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["tokens"] for step in steps] == [64, 128, 192, 256, 320, 384]
    assert losses(folder)[:2] == quiet[:2]
    assert steps[2]["grad_norm"] is None
    assert losses(folder)[2] == quiet[2], "the loss was as it should be"
    assert None not in losses(folder)
    assert losses(folder)[3] != quiet[3]


def test_roll_back_takes_the_newest_checkpoint_and_the_samples_behind(folder, quiet):
    codes, said = run(folder, "--on-bad-step", "roll-back", poison=Poison("infinite loss", (4,)))
    assert codes == [0, 0]
    assert len(re.findall("step 4, .* is bad: .*; back to saved/step-00000002, and on", said)) == 1
    steps = metrics(folder)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["roll_backs"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["tokens"] // 64 for step in steps] == [1, 2, 5, 6, 7, 8], (
        "the samples of steps 3 and 4 are left out"
    )
    assert losses(folder)[:2] == quiet[:2]
    assert losses(folder)[2] != quiet[2]


BAD_FROM_3 = Poison("nan gradient", (3, 4, 5, 6))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saved").glob("step-*"))


def test_checkpoints_without_a_good_step_do_not_keep_a_run_alive(folder):
    codes, said = run(folder, "--max-bad-steps", "3", "--keep-last", "1", poison=BAD_FROM_3)
    assert codes == [6, 6]
    assert said.count("Diverged") == 1
    assert said.count("new run") == 1
    assert len(re.findall("no checkpoint after step 4", said)) == 1
    assert checkpoints(folder) == ["step-00000002"]


@pytest.mark.parametrize("flags", [(), ("--async-save",)])
def test_the_last_checkpoint_of_bad_steps_alone_retires_none(folder, flags):
    codes, _ = run(folder, "--keep-last", "1", *flags, poison=BAD_FROM_3)
    assert codes == [0, 0]
    assert checkpoints(folder) == ["step-00000002", "step-00000006"]
    assert run(folder, "--train-iters", "8", "--keep-last", "1")[0] == [0, 0]
    assert checkpoints(folder) == ["step-00000008"]
