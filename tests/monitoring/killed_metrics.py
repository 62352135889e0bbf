"""Kill a process that writes a metrics file before each of its file operations.

    python -m tests.monitoring.killed_metrics FOLDER

A program of its own, so that the processes it forks have not loaded torch. Prints the number of
kills; exits with a traceback at the first kill that lost, tore or repeated a line. Only the file of
superseded lines may have a line twice, after a kill in the middle of a write.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_ring.monitoring.metrics_file import MetricsFile

# Functions of os that make a system call; a write is also killed half way through.
OPERATIONS = "open", "write", "ftruncate", "fsync", "replace", "close", "mkdir"


def ignore(note: str) -> None:
    pass


def write(file: MetricsFile, steps: range, attempt: str) -> None:
    for step in steps:
        file.write({"step": step, "attempt": attempt})


def fresh(path: Path) -> None:
    """A run from step 0 with an earlier run's file, which rolls back from step 4 to step 2."""
    file = MetricsFile(path, ignore)
    file.begin(0)
    write(file, range(1, 5), "first")
    file.rewind_to(2)
    write(file, range(3, 5), "second")


def resumed(path: Path) -> None:
    """A run that resumes from a checkpoint of step 2."""
    file = MetricsFile(path, ignore)
    file.begin(2)
    write(file, range(3, 7), "third")
    file.flush()


def killed_before(count: int, act: Callable[[Path], None], path: Path, half: bool) -> bool:
    """Fork a process that is killed before its ``count``-th operation; returns if it completed.

    half: if the operation is a write, it is killed half way through it.
    """
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    remaining = itertools.count(count, -1)
    original_write = os.write

    def stop_before(real: Callable) -> Callable:
        def operation(*arguments, **named):
            if next(remaining) == 1:
                if half and real is original_write:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os._exit(1)
            return real(*arguments, **named)

        return operation

    for name in OPERATIONS:
        setattr(os, name, stop_before(getattr(os, name)))
    act(path)
    os._exit(0)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def complete_lines(path: Path) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def all_lines(path: Path) -> list[str]:
    """Return the complete lines of the file, the superseded ones and those of earlier runs."""
    return [line for file in sorted(path.parent.iterdir()) for line in complete_lines(file)]


Act = Callable[[Path], None]


def kill_everywhere(parent: Path, before: Act, act: Act, after: int) -> int:
    """Kill ``act`` at each of its operations, then run again from step ``after``.

    Returns the number of operations.
    """
    for half in (False, True):
        for count in itertools.count(1):
            path = parent / f"{count}-{half}" / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            before(path)
            completed = killed_before(count, act, path, half)
            before_restart = all_lines(path)
            file = MetricsFile(path, ignore)
            file.begin(after)
            write(file, range(after + 1, 9), "last")
            steps = [line["step"] for line in lines(path)]
            assert steps == [*range(1, 9)], f"{path} after operation {count}"
            lost = set(before_restart) - set(all_lines(path))
            assert not lost, f"lost {lost} after operation {count}"
            if completed:
                break
    return count - 1


def earlier(path: Path) -> None:
    path.write_text("".join(f'{{"step": {step}, "attempt": "earlier"}}\n' for step in (1, 2, 3)))


def interrupted(path: Path) -> None:
    complete = [f'{{"step": {step}, "attempt": "before"}}\n' for step in (1, 2, 3, 4)]
    path.write_text("".join(complete) + '{"step": 5, "at')


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    assert "torch" not in sys.modules
    operations = kill_everywhere(folder / "fresh", earlier, fresh, 0)
    print(operations + kill_everywhere(folder / "resumed", interrupted, resumed, 2))
