"""Real ranks for a test: processes joined by gloo over loopback, with one thread each.

Their rendezvous is a file of their own, so that tests cannot collide on a port. They are forked
from a server that has imported the common modules once: a start takes a tenth of a second of CPU
time instead of two.
"""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
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


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``body(rank, world_size, *args)`` in ``world_size`` processes; return results by rank.

    Raises RankFailed with the traceback of the first rank that raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            fork_processes(_rank, (world_size, Path(folder), body, args), world_size)
        except ProcessException as error:
            first = Path(folder, "failure")
            raise RankFailed(first.read_text() if first.exists() else str(error)) from None
        return [
            torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)
        ]


def fork_processes(fn: Callable[..., None], args: tuple, nprocs: int) -> None:
    """Do what ``torch.multiprocessing.spawn`` does, with forked processes."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    start_processes(fn, args, nprocs, start_method="forkserver")


def _rank(rank: int, world_size: int, folder: Path, body: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", rendezvous, timedelta(minutes=5), world_size, rank)
        torch.save(body(rank, world_size, *args), folder / f"{rank}.pt")
    except BaseException:
        with contextlib.suppress(FileExistsError), open(folder / "failure", "x") as failure:
            failure.write(f"rank {rank} of {world_size} failed: {traceback.format_exc()}")
        raise
    # Without both, a rank that has finished may abort the last transfer of another.
    dist.barrier()
    dist.destroy_process_group()
