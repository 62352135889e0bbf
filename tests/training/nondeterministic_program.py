"""pretrain_gpt.py with a model that also calls an operator without a deterministic version."""

import runpy
import sys
from pathlib import Path

import torch

from megatron_ring.model.gpt import GPT

hidden = GPT.hidden


def hidden_after_put(self: GPT, *inputs: torch.Tensor) -> torch.Tensor:
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    return hidden(self, *inputs)


GPT.hidden = hidden_after_put
sys.path.insert(0, str(Path(__file__).parents[2]))
runpy.run_path(str(Path(__file__).parents[2] / "pretrain_gpt.py"), run_name="__main__")
