"""pretrain_gpt.py as it is, but that one rank computes something that is not finite, in steps that are named.

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
    """``act``, a key of ACTS, done to the loss of ``rank`` in the steps that it takes as its first, second, ..."""

    act: str
    steps: tuple[int, ...]
    rank: int = 1

    def environment(self) -> dict[str, str]:
        """What has poisoned.py do this."""
        return {"POISON": json.dumps(asdict(self))}


def spread(poison: Poison) -> None:
    """Have this process's losses poisoned in those steps."""
    loss_sum, train_step, taken = Engine._loss_sum, Engine.train_step, []

    def counted_step(engine: Engine, *arguments) -> StepResult:
        taken.append(True)
        Engine._loss_sum = poisoned if len(taken) in poison.steps else loss_sum
        result = train_step(engine, *arguments)
        Engine._loss_sum = loss_sum
        return result

    def poisoned(engine: Engine, batch: Batch) -> torch.Tensor:
        return ACTS[poison.act](loss_sum(engine, batch))

    Engine.train_step = counted_step


if __name__ == "__main__":
    poison = Poison(**json.loads(os.environ["POISON"]))
    if poison.rank == int(os.environ["RANK"]):
        spread(poison)
    runpy.run_path(str(PROGRAM), run_name="__main__")
