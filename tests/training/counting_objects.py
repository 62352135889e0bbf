"""pretrain_gpt.py that prints the number of Python objects after some of its steps."""

import gc
import runpy
import sys
from pathlib import Path

from megatron_ring.engine.engine import Engine, StepResult

COUNTED_AFTER = (40, 140)
train_step = Engine.train_step
steps = 0


def train_and_count(self: Engine, *arguments: object) -> StepResult:
    global steps
    result = train_step(self, *arguments)
    steps += 1
    if steps in COUNTED_AFTER:
        gc.collect()
        print(f"objects after step {steps}: {len(gc.get_objects())}", flush=True)
    return result


Engine.train_step = train_and_count
sys.path.insert(0, str(Path(__file__).parents[2]))
runpy.run_path(str(Path(__file__).parents[2] / "pretrain_gpt.py"), run_name="__main__")
