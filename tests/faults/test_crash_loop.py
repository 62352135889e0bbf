"""A run that is killed at random moments and restarted each time equals an undisturbed run.

Two ranks over gloo are killed together with SIGKILL: while they start, in a step, in a save, and at
the moment when a resumed run cuts its metrics file. After every kill the metrics file must have
each step up to the newest checkpoint once; at the end the file and all checkpoints must be those of
an undisturbed run, except for times, and no complete line may have been lost.
``--kills`` sets the number of kills.
"""

import contextlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.checkpoint import names, store
from tests.forked import Forked
from tests.programs import free_port, start_rank, working_folder

pytestmark = pytest.mark.whole

STEPS = 24
SAVE_INTERVAL = 4
SMALL = f"""\
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2}}
parallel: {{context_parallel: striped}}
data: {{data_path: [text/tokens], seq_length: 64, split: [0.7, 0.15, 0.15]}}
training: {{train_iters: {STEPS}, lr_warmup_iters: 1, eval_interval: 4, eval_iters: 1, dtype: fp32}}
checkpoint: {{save: saved, load: saved, save_interval: {SAVE_INTERVAL}}}
logging: {{metrics_file: metrics.jsonl}}
"""
TIMED = {"tokens_per_second", "step_seconds", "data_seconds", "slowest_rank", "slowest_over_mean"}
COMPARED_STATE = "step", "consumed_samples", "optimizer_steps", "skipped_steps"
SECONDS_TO_END = 240


class Run:
    """A run of two ranks in ``folder``."""

    def __init__(self, folder: Path, flags: list[str]):
        port = free_port()
        self.began = time.monotonic()
        self.ranks: list[Forked] = [start_rank(rank, port, folder, flags) for rank in (0, 1)]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Return whether ``condition`` held before the run ended."""
        while any(rank.returncode is None for rank in self.ranks):
            if condition():
                return True
            assert self.seconds < SECONDS_TO_END
            time.sleep(0.0005)
        return False

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.communicate(timeout=60)

    def end(self) -> None:
        outputs = [rank.communicate(timeout=SECONDS_TO_END)[0] for rank in self.ranks]
        assert [rank.returncode for rank in self.ranks] == [0, 0], "".join(outputs)


def complete_lines(file: Path) -> list[str]:
    """Return the lines of a file except an incomplete last one, which a kill can leave."""
    try:
        text = file.read_text()
    except FileNotFoundError:  # or it has just been renamed
        return []
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert all(isinstance(json.loads(line), dict) for line in lines)
    return lines


def figures(lines: list[str], up_to: int = STEPS) -> list[dict]:
    """Return the records up to a step, without what depends on time."""
    records = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in record.items() if key not in TIMED}
        for record in records
        if record["step"] <= up_to
    ]


def newest_step(folder: Path) -> int:
    """Return the step of the checkpoint that a run would resume from, 0 without one."""
    newest = store.newest(folder / "saved") if (folder / "saved").exists() else None
    return newest.state.step if newest else 0


def content(checkpoint: Path) -> dict[str, object]:
    """Return all tensors of a checkpoint, and its state without times."""
    state = json.loads((checkpoint / "state.json").read_text())
    tensors = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    return tensors | {key: state[key] for key in COMPARED_STATE}


def last_step(file: Path) -> int:
    lines = complete_lines(file)
    return json.loads(lines[-1])["step"] if lines else 0


class Moment:
    """A moment at which to kill a run of ``folder`` that is about to start.

    ``kind`` is one of KINDS.
    """

    def __init__(self, kind: str, draw: random.Random, folder: Path, seconds_to_start: float):
        self.kind = kind
        self.share = draw.random()
        self.seconds_to_start = seconds_to_start
        self.metrics = folder / "metrics.jsonl"
        after = max(newest_step(folder), SAVE_INTERVAL)  # with a checkpoint to resume from
        self.step = after + (SAVE_INTERVAL if kind == "in a save" else draw.randint(2, 6))
        self.before = self._files()

    def wait(self, run: Run) -> bool:
        """Block until the moment, and return whether it came before the run ended."""
        came = run.wait_until(lambda: self._has_come(run))
        if came and self.kind in ("in a step", "in a save"):
            time.sleep(self.share * 0.3)
        return came

    def _has_come(self, run: Run) -> bool:
        if self.kind == "while it starts":
            return run.seconds > self.share * self.seconds_to_start
        files = self._files()
        if files == self.before:  # an earlier run's lines are still there
            return False
        return self.kind == "while it truncates its metrics" or last_step(self.metrics) >= self.step

    def _files(self) -> list[tuple[int, int]]:
        """Return sizes and times of the files that a resume or a step changes."""
        files = self.metrics, self.metrics.with_name("metrics.jsonl.superseded")
        found = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                found.append((file.stat().st_size, file.stat().st_mtime_ns))
        return found


KINDS = "while it starts", "in a step", "in a save", "while it truncates its metrics"


def test_a_run_killed_at_any_moment_and_restarted_equals_an_undisturbed_one(tmp_path, pytestconfig):
    undisturbed = working_folder(tmp_path, SMALL)
    run = Run(undisturbed, [])
    assert run.wait_until((undisturbed / "metrics.jsonl").exists)
    seconds_to_start = run.seconds
    run.end()
    expected = complete_lines(undisturbed / "metrics.jsonl")
    steps = [record["step"] for record in figures(expected) if "loss" in record]
    assert steps == [*range(1, STEPS + 1)]

    draw = random.Random(0)
    kills = pytestconfig.getoption("kills")
    done = dict.fromkeys(KINDS, 0)
    while sum(done.values()) < kills:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copy(undisturbed / "small.yaml", folder)
        shutil.copytree(undisturbed / "text", folder / "text")
        kill_until_it_ends(folder, expected, draw, done, kills, seconds_to_start)
        assert figures(complete_lines(folder / "metrics.jsonl")) == figures(expected)
        assert (folder / "metrics.jsonl").read_text().endswith("\n")
        for checkpoint in names.checkpoints(undisturbed / "saved"):
            assert content(folder / "saved" / checkpoint.name) == content(checkpoint)
    print(f"killed {done}")


def kill_until_it_ends(
    folder: Path,
    expected: list[str],
    draw: random.Random,
    done: dict[str, int],
    kills: int,
    seconds_to_start: float,
) -> None:
    """Restart the run until it reaches its end; ``done`` counts the kills of each kind."""
    seen: set[str] = set()
    while True:
        kind = min(done, key=lambda kind: (done[kind], draw.random()))
        moment = Moment(kind, draw, folder, seconds_to_start)
        run = Run(folder, draw.choice([[], ["--async-save"]]))
        if sum(done.values()) >= kills or not moment.wait(run):
            run.end()
            break
        run.kill()
        done[kind] += 1
        lines = complete_lines(folder / "metrics.jsonl")
        newest = newest_step(folder)
        assert not newest or figures(lines, newest) == figures(expected, newest)
        seen.update(lines)
        superseded = len(complete_lines(folder / "metrics.jsonl.superseded"))
        found = f"checkpoint {newest}, {len(lines)} lines, {superseded} superseded"
        print(f"killed {kind}: {found}", flush=True)
    kept = {line for file in folder.glob("metrics.jsonl*") for line in complete_lines(file)}
    assert seen <= kept, "lines were lost"
