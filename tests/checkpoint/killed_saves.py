"""Kill saves, over and over, and look at what is left: a program of its own, so that what it forks has no torch in it.

    python -m tests.checkpoint.killed_saves at_random FOLDER
    python -m tests.checkpoint.killed_saves at_every_action FOLDER

Prints how many saves were killed; ends with a traceback at the first one that lost anything.
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
    """SIGKILL a process that saves without end, and start it again on the same folder; returns how many times."""
    moment = random.Random(0)
    began = time.perf_counter()
    save_in_chunks(folder, 1)
    seconds = time.perf_counter() - began
    for _ in range(times):
        reported = kill_after(moment.uniform(0, 3 * seconds), save_endlessly, folder)
        found = latest(folder)
        assert found in (reported, reported + 1), (
            f"step {found} is the newest, {reported} was reported"
        )
    return times


def at_every_action(folder: Path) -> int:
    """End a save before each thing that it asks of the file system, one after another; returns how many there are.

    First of a save that lets older checkpoints go, then of one that takes the place of the only one there is.
    What a killed process has written stays without fsync, which is left out because it takes most of the time.
    """
    os.fsync = lambda _: None
    return before_each(folder / "new", (1, 2, 3), 4, latest) + before_each(
        folder / "again", (1,), 1, newest
    )


def before_each(
    parent: Path, steps: tuple[int, ...], step: int, look: Callable[[Path], int]
) -> int:
    """Save ``step`` after ``steps``, cut short before its 1st, 2nd, ... action; how many actions it takes."""
    for count in range(1, 1000):
        folder = parent / str(count)
        for earlier in steps:
            write(folder, earlier)
        ended = run_up_to(count, write, folder, step, KEEP_ONE)
        assert look(folder) in ((step,) if ended else (steps[-1], step)), f"before action {count}"
        write(folder, step + 1, KEEP_ONE)
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["latest", f"step-{step + 1:08d}"], f"{left} after action {count}"
        if ended:
            return count - 1
    raise AssertionError("a save without an end")


def newest(folder: Path) -> int:
    """The step that a run would resume from."""
    return store.newest(folder).state.step


def latest(folder: Path) -> int:
    """The step that a run would resume from, which ``latest`` must name; all that are there must be whole."""
    for path in names.checkpoints(folder):
        store.verify(path)
    assert (folder / names.LATEST).read_text() == f"step-{newest(folder):08d}\n"
    return newest(folder)


def run_up_to(count: int, act: Callable, *args: object) -> bool:
    """Fork a process that acts and ends before its ``count``-th action on files; whether it came to its own end."""
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    remaining = iter(range(count - 1))

    def end_in_time(event: str, _: tuple) -> None:
        if event.startswith(("os.", "open")) and next(remaining, None) is None:
            os._exit(1)

    sys.addaudithook(end_in_time)
    act(*args)
    os._exit(0)


def kill_after(seconds: float, body: Callable[[Path, int], None], folder: Path) -> int:
    """Fork a process for ``body(folder, report)`` and kill it ``seconds`` after its first report; returns its last."""
    reading, report = os.pipe()
    if not (process := os.fork()):
        body(folder, report)
    os.close(report)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert ended == -signal.SIGKILL, f"it ended by itself: {ended}"
        return int([first, *lines][-1])


def save_endlessly(folder: Path, report: int) -> None:
    """Go on after the newest checkpoint, and report each step that is saved."""
    step = newest(folder)
    while True:
        os.write(report, b"%d\n" % step)
        step += 1
        save_in_chunks(folder, step)


def save_in_chunks(folder: Path, step: int) -> None:
    """A checkpoint of three files of 256 KiB, written piece by piece."""
    store.prepare(folder, step)
    for rank in range(3):
        with (folder / names.partial_name(step) / f"rank-{rank}.pt").open(
            "wb", buffering=0
        ) as file:
            for chunk in range(8):
                file.write(bytes([step % 256, rank, chunk, 0]) * 8192)
    store.commit(
        folder, state(step), KEEP_TWO, store.seal(folder, step, store.written(folder, step))
    )


if __name__ == "__main__":
    assert "torch" not in sys.modules, "checkpoints are found and checked without torch"
    print(
        {"at_random": at_random, "at_every_action": at_every_action}[sys.argv[1]](Path(sys.argv[2]))
    )
