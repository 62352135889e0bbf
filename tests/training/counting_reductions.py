"""pretrain_gpt.py that prints at its end how often each context-parallel reduction ran."""

import runpy
import sys
from collections import Counter
from pathlib import Path

import torch

from megatron_ring.context_parallel.attention import REDUCTIONS

calls: Counter[str] = Counter()


def count(reduction: str) -> None:
    module = REDUCTIONS[reduction]
    original_forward = module.forward

    def forward(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls[reduction] += 1
        return original_forward(*arguments)

    module.forward = forward


for name in REDUCTIONS:
    count(name)
sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    runpy.run_path(str(Path(__file__).parents[2] / "pretrain_gpt.py"), run_name="__main__")
finally:
    print("forward passes:", *(f"{name} {calls[name]}" for name in REDUCTIONS), flush=True)
