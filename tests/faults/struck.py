"""pretrain_gpt.py as it is, but that one rank does something to itself, at a moment that is the same in every run.

A program for tests: ``FAULT`` in its environment is a Fault as JSON. Nothing of the package is replaced; what it does
is only looked at on its way, in the kernel, where a hop's keys travel while it computes, and where a save writes.
"""

import json
import os
import resource
import runpy
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ring.checkpoint import tensors
from megatron_ring.kernels.attention import sdpa
from megatron_ring.parallel.progress import Direction, ProgressTracker

ROOT = Path(__file__).parents[2]
TOKENS = Path("text/tokens.bin")
SMALL = 20_000  # bytes; a rank's part of a checkpoint has more


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def spoil(tokens: Path) -> None:
    """Put ids there that no small vocabulary has, in the file itself, where other processes see it."""
    _let_all_read_ahead()
    with tokens.open("r+b") as file:
        file.write(b"\xff" * tokens.stat().st_size)


def cut(tokens: Path) -> None:
    """Leave little of the file."""
    _let_all_read_ahead()
    os.truncate(tokens, 100)


def _let_all_read_ahead() -> None:
    """So that all have the same steps ready, and meet what comes now in the same one."""
    time.sleep(1)


ACTS: dict[str, Callable[[], None]] = {
    "is killed": lambda: send(signal.SIGKILL),
    "is stopped": lambda: send(signal.SIGSTOP),
    "is told to end": lambda: send(signal.SIGTERM),
    "has a full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL)),
    "cuts the data": lambda: cut(TOKENS),
    "spoils the data": lambda: spoil(TOKENS),
}


@dataclass(frozen=True)
class Fault:
    """``act``, a key of ACTS, of ``rank``: in ``hop`` of ``step``, from 1; or, in hop 0, in the save after it."""

    act: str
    step: int
    hop: int = 1
    direction: str = "FORWARD"
    layer: int = 0
    rank: int = 1

    def environment(self) -> dict[str, str]:
        """What has struck.py do this."""
        return {"FAULT": json.dumps(asdict(self))}

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.step, self.layer, Direction[self.direction], self.hop


def strike(fault: Fault) -> None:
    """Have this process act as soon as it is where ``fault`` says."""
    if fault.hop:
        _in_kernel(fault)
    else:
        _in_save(fault)


def _in_kernel(fault: Fault) -> None:
    begin_hop, here = ProgressTracker.begin_hop, None

    def remember(place: ProgressTracker, hop: int, hops: int) -> None:
        nonlocal here
        begin_hop(place, hop, hops)
        here = place.read()[:4]

    def watched(compute: Callable[..., None]) -> Callable[..., None]:
        def act_and_compute(*inputs) -> None:
            if here == fault.place:
                ACTS[fault.act]()
            compute(*inputs)

        return act_and_compute

    ProgressTracker.begin_hop = remember
    sdpa.forward, sdpa.backward = watched(sdpa.forward), watched(sdpa.backward)


def _in_save(fault: Fault) -> None:
    write_part = tensors.write_part

    def act_and_write(folder: Path, *rest) -> list[tensors.Written]:
        if folder.name.endswith(f"{fault.step:08d}"):
            ACTS[fault.act]()
        return write_part(folder, *rest)

    tensors.write_part = act_and_write


if __name__ == "__main__":
    fault = Fault(**json.loads(os.environ["FAULT"]))
    if fault.rank == int(os.environ["RANK"]):
        strike(fault)
    runpy.run_path(str(ROOT / "pretrain_gpt.py"), run_name="__main__")
