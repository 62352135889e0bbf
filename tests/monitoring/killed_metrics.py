"""Kill a run's metrics file before every operation on files: a program of its own, so that what it
forks has no torch.

    python -m tests.monitoring.killed_metrics FOLDER

Prints how many times it was killed; ends with a traceback at the first one that lost, tore or
repeated a line. Only the file of superseded lines may have a line twice, if it was killed in the
middle of a write.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_ring.monitoring.metrics_file import MetricsFile

# Each of these asks the system for something; a write may also be killed half way.
OPERATIONS = "open", "write", "ftruncate", "fsync", "replace", "close", "mkdir"


def ignore(note: str) -> None:
    pass


def write(file: MetricsFile, steps: range, attempt: str) -> None:
    for step in steps:
        file.write({"step": step, "attempt": attempt})


def fresh(path: Path) -> None:
    """A run that finds the file of an earlier one, trains to step 4 and goes back to step 2."""
    file = MetricsFile(path, ignore)
    file.begin(0)
    write(file, range(1, 5), "first")
    file.rewind_to(2)
    write(file, range(3, 5), "second")


def resumed(path: Path) -> None:
    """A run that goes on from a checkpoint of step 2."""
    file = MetricsFile(path, ignore)
    file.begin(2)
    write(file, range(3, 7), "third")
    file.flush()


def killed_before(count: int, act: Callable[[Path], None], path: Path, half: bool) -> bool:
    """Fork a process that ends before its ``count``-th operation, or in the middle of it if that is
    a write.

    Returns whether it came to its own end.
    """
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    remaining, really_write = itertools.count(count, -1), os.write

    def stop_before(real: Callable) -> Callable:
        def operation(*arguments, **named):
            if next(remaining) == 1:
                if half and real is really_write:
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


def whole(path: Path) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def everything(path: Path) -> list[str]:
    """All whole lines of the file, of superseded ones and of those moved aside."""
    return [line for file in sorted(path.parent.iterdir()) for line in whole(file)]


Act = Callable[[Path], None]


def kill_everywhere(parent: Path, before: Act, act: Act, after: int) -> int:
    """Cut ``act`` short at each operation, then run again from step ``after``; returns how many
    operations it has.
    """
    for half in (False, True):
        for count in itertools.count(1):
            path = parent / f"{count}-{half}" / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            before(path)
            ended = killed_before(count, act, path, half)
            was = everything(path)
            file = MetricsFile(path, ignore)
            file.begin(after)
            write(file, range(after + 1, 9), "last")
            steps = [line["step"] for line in lines(path)]
            assert steps == [*range(1, 9)], f"{path} after operation {count}"
            lost = set(was) - set(everything(path))
            assert not lost, f"lost {lost} after operation {count}"
            if ended:
                break
    return count - 1


def earlier(path: Path) -> None:
    path.write_text("".join(f'{{"step": {step}, "attempt": "earlier"}}\n' for step in (1, 2, 3)))


def interrupted(path: Path) -> None:
    whole = [f'{{"step": {step}, "attempt": "before"}}\n' for step in (1, 2, 3, 4)]
    path.write_text("".join(whole) + '{"step": 5, "at')


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    assert "torch" not in sys.modules
    operations = kill_everywhere(folder / "fresh", earlier, fresh, 0)
    print(operations + kill_everywhere(folder / "resumed", interrupted, resumed, 2))
