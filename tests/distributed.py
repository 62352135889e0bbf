"""Real ranks for a test: processes joined by gloo or NCCL over loopback, with one thread each.

Their rendezvous is a file of their own, so that tests cannot collide on a port. They are forked
from a server that has imported the common modules once: a start takes a tenth of a second of CPU
time instead of two.
"""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

# What a rank of a run imports before its first step. The last one brings torch's compiler, which
# DeepSpeed needs once it gets an optimizer and which takes longer than all others. The server
# ignores modules that are not installed.
PRELOADED = [
    "torch",
    "torch._dynamo",
    "megatron_ring.training.assembly",
    "deepspeed.runtime.zero.muon.original_muon",
]


class RankFailed(Exception):
    """The first rank that failed, and its traceback."""


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, device: str = "cpu"
) -> list[Any]:
    """Run ``body(rank, world_size, *args)`` in ``world_size`` processes; return results by rank.

    On the device "cuda" they are joined by NCCL, with a GPU each if there are enough, else on the
    first one together. Raises RankFailed with the traceback of the first rank that raises.
    """
    method = cuda_start_method() if device == "cuda" else "forkserver"
    with tempfile.TemporaryDirectory() as folder:
        try:
            fork_processes(
                _rank, (world_size, Path(folder), device, body, args), world_size, method
            )
        except ProcessException as error:
            first = Path(folder, "failure")
            raise RankFailed(first.read_text() if first.exists() else str(error)) from None
        return [
            torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)
        ]


def fork_processes(
    fn: Callable[..., None], args: tuple, nprocs: int, method: str = "forkserver"
) -> None:
    """Do what ``torch.multiprocessing.spawn`` does, with forked processes."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    start_processes(fn, args, nprocs, start_method=method)


@functools.cache
def cuda_start_method() -> str:
    """Return "forkserver" if a process forked from the server can use CUDA, else "spawn".

    It cannot if one of the modules that the server has imported has initialized CUDA.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return "forkserver" if pool.submit(_can_use_cuda).result() else "spawn"


def _can_use_cuda() -> bool:
    try:
        return torch.ones(1, device="cuda").item() == 1
    except RuntimeError:
        return False


def local_rank(rank: int, world_size: int) -> int:
    """Return the GPU of a rank: one of its own, or the first one if there are too few."""
    return rank if world_size <= torch.cuda.device_count() else 0


def _rank(
    rank: int, world_size: int, folder: Path, device: str, body: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}/rendezvous"
    try:
        if device == "cuda":
            gpu = torch.device("cuda", local_rank(rank, world_size))
            torch.cuda.set_device(gpu)
            # As in training, a group of several ranks is bound to the GPU. The timeout is shorter
            # than on a CPU, where many tests share the cores.
            bound = gpu if world_size > 1 else None
            timeout = timedelta(minutes=1)
            dist.init_process_group("nccl", rendezvous, timeout, world_size, rank, device_id=bound)
        else:
            dist.init_process_group("gloo", rendezvous, timedelta(minutes=5), world_size, rank)
        torch.save(body(rank, world_size, *args), folder / f"{rank}.pt")
    except BaseException:
        with contextlib.suppress(FileExistsError), open(folder / "failure", "x") as failure:
            failure.write(f"rank {rank} of {world_size} failed: {traceback.format_exc()}")
        raise
    # Without both, a rank that has finished may abort the last transfer of another.
    dist.barrier()
    dist.destroy_process_group()
