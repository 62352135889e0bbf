"""Kills saves repeatedly and checks what is left.

    python -m tests.checkpoint.killed_saves at_random FOLDER
    python -m tests.checkpoint.killed_saves at_every_action FOLDER

A separate program, so that the processes it forks have not imported torch. Prints how many saves
were killed; ends with a traceback at the first one that lost a checkpoint.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ring.checkpoint import names, store
from megatron_ring.config import CheckpointConfig, Config
from tests.checkpoint.small import state, write

KEEP_TWO = Config(checkpoint=CheckpointConfig(save="saved", keep_last=2))
KEEP_ONE = Config(checkpoint=CheckpointConfig(save="saved", keep_last=1))


def at_random(folder: Path, times: int = 50) -> int:
    """SIGKILL a process that saves in a loop and restart it on the same folder, ``times`` times."""
    generator = random.Random(0)
    began = time.perf_counter()
    save_in_chunks(folder, 1)
    seconds = time.perf_counter() - began
    for _ in range(times):
        reported = kill_after(generator.uniform(0, 3 * seconds), save_endlessly, folder)
        step = latest(folder)
        assert step in (reported, reported + 1), (
            f"step {step} is the newest, {reported} was reported"
        )
    return times


def at_every_action(folder: Path) -> int:
    """End a save before each of its file-system actions; returns how many actions there are.

    First for a save that deletes older checkpoints, then for one that replaces the only checkpoint.
    fsync is left out because it takes most of the time: what a killed process has written stays
    without it.
    """
    os.fsync = lambda _: None
    of_new_step = before_each(folder / "new", (1, 2, 3), 4, latest)
    of_same_step = before_each(folder / "again", (1,), 1, newest)
    return of_new_step + of_same_step


def before_each(
    parent: Path, steps: tuple[int, ...], step: int, find: Callable[[Path], int]
) -> int:
    """Save ``step`` after ``steps``, ended before its 1st, 2nd, ... action.

    Returns the number of actions.
    """
    for count in range(1, 1000):
        folder = parent / str(count)
        for earlier in steps:
            write(folder, earlier)
        completed = run_up_to(count, write, folder, step, KEEP_ONE)
        allowed = (step,) if completed else (steps[-1], step)
        assert find(folder) in allowed, f"before action {count}"
        write(folder, step + 1, KEEP_ONE)
        entries = sorted(path.name for path in folder.iterdir())
        assert entries == ["latest", f"step-{step + 1:08d}"], f"{entries} after action {count}"
        if completed:
            return count - 1
    raise AssertionError("the save does not end")


def newest(folder: Path) -> int:
    """Return the step that a run would resume from."""
    return store.newest(folder).state.step


def latest(folder: Path) -> int:
    """Return the step that a run would resume from.

    Checks that ``latest`` names it and that all checkpoints are complete.
    """
    for path in names.checkpoints(folder):
        store.verify(path)
    assert (folder / names.LATEST).read_text() == f"step-{newest(folder):08d}\n"
    return newest(folder)


def run_up_to(count: int, act: Callable, *args: object) -> bool:
    """Fork a process that calls ``act`` and exits before its ``count``-th action on files.

    Returns whether ``act`` completed before that.
    """
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    remaining = iter(range(count - 1))

    def exit_before_action(event: str, _: tuple) -> None:
        if event.startswith(("os.", "open")) and next(remaining, None) is None:
            os._exit(1)

    sys.addaudithook(exit_before_action)
    act(*args)
    os._exit(0)


def kill_after(seconds: float, body: Callable[[Path, int], None], folder: Path) -> int:
    """Fork a process for ``body(folder, report)`` and kill it ``seconds`` after its first report.

    Returns its last report.
    """
    reading, report = os.pipe()
    if not (process := os.fork()):
        body(folder, report)
    os.close(report)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert exit_code == -signal.SIGKILL, f"it exited with {exit_code} before the signal"
        return int([first, *lines][-1])


def save_endlessly(folder: Path, report: int) -> None:
    """Save one step after another from the newest checkpoint on, and report each."""
    step = newest(folder)
    while True:
        os.write(report, b"%d\n" % step)
        step += 1
        save_in_chunks(folder, step)


def save_in_chunks(folder: Path, step: int) -> None:
    """Save a checkpoint of three files of 256 KiB, written in pieces."""
    store.prepare(folder, step)
    for rank in range(3):
        path = folder / names.partial_name(step) / f"rank-{rank}.pt"
        with path.open("wb", buffering=0) as file:
            for chunk in range(8):
                file.write(bytes([step % 256, rank, chunk, 0]) * 8192)
    records = store.flush_and_checksum(folder, step, store.written(folder, step))
    store.commit(folder, state(step), KEEP_TWO, records)


if __name__ == "__main__":
    assert "torch" not in sys.modules, "checkpoints are found and verified without torch"
    modes = {"at_random": at_random, "at_every_action": at_every_action}
    print(modes[sys.argv[1]](Path(sys.argv[2])))
