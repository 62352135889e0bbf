"""pretrain_gpt.py on a machine that seems to have STAND_IN_GPUS GPUs, none of which may be used."""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch


def use_cuda(*arguments: object) -> None:
    raise AssertionError("CUDA is used")


count = int(os.environ["STAND_IN_GPUS"])
torch.cuda.is_available = lambda: count > 0
torch.cuda.device_count = lambda: count
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"GPU-{index}")
torch.cuda.set_device = use_cuda
torch.cuda.init = use_cuda
sys.path.insert(0, str(Path(__file__).parents[2]))
runpy.run_path(str(Path(__file__).parents[2] / "pretrain_gpt.py"), run_name="__main__")
