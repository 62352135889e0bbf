"""pretrain_gpt.py in which one rank computes a non-finite loss or gradient in given steps.

A program for tests: ``POISON`` in its environment is a Poison as JSON.
"""

import json
import math
import os
import runpy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_ring.data.loader import Batch
from megatron_ring.engine.engine import Engine, StepResult

PROGRAM = Path(__file__).parents[2] / "pretrain_gpt.py"


def _nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan loss": lambda loss: loss * math.nan,
    "infinite loss": lambda loss: loss + math.inf,
    "nan gradient": _nan_gradient,
}


@dataclass(frozen=True)
class Poison:
    """``act``, a key of ACTS, applied to the loss of ``rank`` in ``steps``, counted from 1.

    Steps are those that the process runs, so a repeated step counts again.
    """

    act: str
    steps: tuple[int, ...]
    rank: int = 1

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give poisoned.py these steps."""
        return {"POISON": json.dumps(asdict(self))}


def install(poison: Poison) -> None:
    """Apply ``poison`` to this process's losses."""
    loss_sum = Engine._loss_sum
    train_step = Engine.train_step
    steps = 0

    def counted_step(engine: Engine, *arguments) -> StepResult:
        nonlocal steps
        steps += 1
        Engine._loss_sum = poisoned if steps in poison.steps else loss_sum
        result = train_step(engine, *arguments)
        Engine._loss_sum = loss_sum
        return result

    def poisoned(engine: Engine, batch: Batch) -> torch.Tensor:
        return ACTS[poison.act](loss_sum(engine, batch))

    Engine.train_step = counted_step


if __name__ == "__main__":
    poison = Poison(**json.loads(os.environ["POISON"]))
    if poison.rank == int(os.environ["RANK"]):
        install(poison)
    runpy.run_path(str(PROGRAM), run_name="__main__")
