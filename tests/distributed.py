"""Real ranks for a test: processes joined by gloo over loopback, one thread each.

They meet in a file of their own, so that no two tests can collide on a port, and are forked from a server that has
imported once what all of them would: a tenth of a second of a processor instead of two.
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

# What a rank of a run imports, from its first line to its first step. The last brings torch's compiler, which is more
# than all else: DeepSpeed asks for it when it is given an optimizer. What is not installed is passed over.
IMPORTED = [
    "torch",
    "torch._dynamo",
    "megatron_ring.training.assembly",
    "deepspeed.runtime.zero.muon.original_muon",
]


class RankFailed(Exception):
    """The first rank that failed, and its traceback."""


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """``body(rank, world_size, *args)`` in each of ``world_size`` processes; what they returned, in rank order."""
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
    """``torch.multiprocessing.spawn``, but that the processes are forked."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes(fn, args, nprocs, start_method="forkserver")


def _rank(rank: int, world_size: int, folder: Path, body: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        meeting = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", meeting, timedelta(minutes=5), world_size, rank)
        torch.save(body(rank, world_size, *args), folder / f"{rank}.pt")
    except BaseException:
        with contextlib.suppress(FileExistsError), open(folder / "failure", "x") as failure:
            failure.write(f"rank {rank} of {world_size} failed: {traceback.format_exc()}")
        raise
    # Without both, a rank that is done may abort another's last transfer.
    dist.barrier()
    dist.destroy_process_group()
