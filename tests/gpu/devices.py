"""The device of a test: a GPU for ``make test-gpu``, and a CPU with few cases for ``make test``.

Both run the same code, so that a line that a GPU machine runs has run on a CPU before.
"""

import os

import pytest
import torch

# From this version on, several ranks of a communicator may have the same GPU.
_NCCL_WITH_SHARED_GPUS = (2, 30)

_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)

each_device = pytest.mark.parametrize("device", [_CUDA, "cpu"], scope="module")

# For tests that repeat on a CPU what another test covers.
each_device_long_on_cpu = pytest.mark.parametrize(
    "device", [_CUDA, pytest.param("cpu", marks=pytest.mark.exhaustive)], scope="module"
)


def skip_without(device: str, ranks: int = 1) -> None:
    """Skip the test if this machine lacks the device, or GPUs for so many ranks.

    Also prepares the environment of processes that use a GPU.
    """
    if device == "cpu":
        return
    # Without it torch.cuda.is_available() initializes CUDA, and processes that are forked from one
    # that has called it cannot use the GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if ranks > torch.cuda.device_count():
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    if not can_run(device, ranks):
        pytest.skip(why_ranks_cannot_share())


def can_run(device: str, ranks: int) -> bool:
    """Return whether so many ranks have a GPU each, or may share one; on a CPU they always run."""
    if device == "cpu" or ranks <= torch.cuda.device_count():
        return True
    return torch.cuda.nccl.version()[:2] >= _NCCL_WITH_SHARED_GPUS


def why_ranks_cannot_share() -> str:
    """Return why several ranks cannot run on this machine's GPUs."""
    version = ".".join(map(str, torch.cuda.nccl.version()))
    needed = ".".join(map(str, _NCCL_WITH_SHARED_GPUS))
    return (
        f"ranks can share a GPU from NCCL {needed} on, and this is {version}, with "
        f"{torch.cuda.device_count()} GPU. Load a newer library with LD_PRELOAD."
    )
