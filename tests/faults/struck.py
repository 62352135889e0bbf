"""pretrain_gpt.py in which one rank gets a fault, at the same moment in every run.

A program for tests: ``FAULT`` in its environment is a Fault as JSON. No function of the package is
replaced; calls are intercepted in the kernel, which computes while a hop's keys are sent, and where
a save writes.
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
SMALL = 20_000  # bytes, less than a rank's part of a checkpoint


def send_signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def overwrite(tokens: Path) -> None:
    """Overwrite the file in place, for all processes, with ids that no small vocabulary has."""
    _wait_for_prefetching()
    with tokens.open("r+b") as file:
        file.write(b"\xff" * tokens.stat().st_size)


def truncate(tokens: Path) -> None:
    """Keep 100 bytes of the file."""
    _wait_for_prefetching()
    os.truncate(tokens, 100)


def _wait_for_prefetching() -> None:
    """Let all ranks load the same steps ahead, so that all find the change in the same step."""
    time.sleep(1)


ACTS: dict[str, Callable[[], None]] = {
    "is killed": lambda: send_signal(signal.SIGKILL),
    "is stopped": lambda: send_signal(signal.SIGSTOP),
    "gets SIGTERM": lambda: send_signal(signal.SIGTERM),
    "has a full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL)),
    "truncates the data": lambda: truncate(TOKENS),
    "overwrites the data": lambda: overwrite(TOKENS),
}


@dataclass(frozen=True)
class Fault:
    """``act``, a key of ACTS, on ``rank`` in ``hop`` (from 1) of ``step``.

    Hop 0 is the save after the step.
    """

    act: str
    step: int
    hop: int = 1
    direction: str = "FORWARD"
    layer: int = 0
    rank: int = 1

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give struck.py this fault."""
        return {"FAULT": json.dumps(asdict(self))}

    @property
    def position(self) -> tuple[int, int, int, int]:
        return self.step, self.layer, Direction[self.direction], self.hop


def strike(fault: Fault) -> None:
    """Make this process act once it is at the position of ``fault``."""
    if fault.hop:
        _in_kernel(fault)
    else:
        _in_save(fault)


def _in_kernel(fault: Fault) -> None:
    begin_hop = ProgressTracker.begin_hop
    current = None

    def note_position(progress: ProgressTracker, hop: int, hops: int, source: int) -> None:
        nonlocal current
        begin_hop(progress, hop, hops, source)
        current = progress.read()[:4]

    def intercept(compute: Callable[..., None]) -> Callable[..., None]:
        def act_and_compute(*inputs) -> None:
            if current == fault.position:
                ACTS[fault.act]()
            compute(*inputs)

        return act_and_compute

    ProgressTracker.begin_hop = note_position
    sdpa.forward = intercept(sdpa.forward)
    sdpa.backward = intercept(sdpa.backward)


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
