"""What the launcher says of this process. The one file that reads ``os.environ``.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM's names; alone, a process is
the whole world. A batch script carries SLURM's names too, but only within a step of srun do they count processes.
The ranks of a step meet on its first node, at a port of their own, unless MASTER_ADDR and MASTER_PORT say where.
"""

import contextlib
import ctypes
import os
import random
import re
import socket
from dataclasses import dataclass

from megatron_ring.errors import ConfigError


@dataclass(frozen=True)
class Environment:
    """global_rank, world_size: among all processes. local_rank, local_size: among those of this machine.

    threads: how many this process should compute with on a CPU: OMP_NUM_THREADS where that is set, else what srun gave
    each, else its share of the cores, so that ranks on one machine do not fight for them.
    """

    global_rank: int
    local_rank: int
    world_size: int
    local_size: int
    threads: int

    @staticmethod
    def read() -> "Environment":
        world_size = _integer("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
        # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = _integer("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=len(_ranks_of_node()) or world_size)
        own_cores = max(1, len(os.sched_getaffinity(0)) // local_size)
        return Environment(
            global_rank=_integer("RANK", "SLURM_PROCID", default=0),
            local_rank=_integer("LOCAL_RANK", "SLURM_LOCALID", default=0),
            world_size=world_size,
            local_size=local_size,
            threads=_integer("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", default=own_cores),
        )

    def complete(self) -> None:
        """Give torch's rendezvous what the launcher left out, so that a bare ``python`` is a world of one.

        Raises ConfigError where srun dealt out the ranks so that rings would leave the nodes at every hop.
        """
        _check_neighbours(_ranks_of_node())
        os.environ.setdefault("RANK", str(self.global_rank))
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        os.environ.setdefault("WORLD_SIZE", str(self.world_size))
        os.environ.setdefault(
            "MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]) if _in_step() else "127.0.0.1"
        )
        os.environ.setdefault("MASTER_PORT", str(_port(self.world_size)))


def slurm_job() -> tuple[str, int]:
    """Return the id of the SLURM job that this process is of, "" outside of one, and how often it was requeued."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdecimal() else 0


def launched_by_deepspeed() -> bool:
    """Return whether DeepSpeed's launcher of a node has started this process: no other sets these names together."""
    return {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def launched_by_torchelastic() -> bool:
    """Return whether torchrun, or another program with torch's elastic agent, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


# What makes a library add up in the same order every time; the first value is given where none is.
_FIXED_ORDER = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_NVLS_ENABLE": ("0",),  # sums that NVLink's switches take, which differ from call to call (NVIDIA/nccl#1497)
}


def fix_order_of_sums() -> None:
    """Have cuBLAS and NCCL repeat themselves. They read it as they start, so it must come before both.

    Raises ConfigError where the environment says otherwise.
    """
    problems = [
        f"deterministic needs {name} to be {' or '.join(legal)}, and the environment has {os.environ[name]}. "
        f"Unset {name}, or leave --deterministic out."
        for name, legal in _FIXED_ORDER.items()
        if os.environ.get(name, legal[0]) not in legal
    ]
    if problems:
        raise ConfigError(problems)
    for name, (first, *_) in _FIXED_ORDER.items():
        os.environ.setdefault(name, first)


# By their numbers in glibc's malloc.h, and what the environment may say of them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, where the environment does not say how it should be.

    By itself it gives tensors of 32 MB and more back at once, and takes each anew, page by page (docs/decisions/0021).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt and not any(name in os.environ for name in _MALLOC_SETTINGS):
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)  # an int's greatest
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def first_host(node_list: str) -> str:
    """The first name of SLURM's short form of many.

    >>> first_host("node[01-03,7],other"), first_host("gpu1,gpu2"), first_host("rack[2,4]-node[5-6]")
    ('node01', 'gpu1', 'rack2-node5')
    """
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", node_list).group()
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)


# Below those that a system gives out by itself: no connection takes one of these before a process listens there.
_PORTS = range(15000, 30000)


def free_port() -> int:
    """One of this machine's at which processes that this one starts can meet."""
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError(f"every port of {_PORTS.start} to {_PORTS.stop - 1} is in use")


def _port(world_size: int) -> int:
    """Of the step's own: jobs that share a node must not meet.

    Alone a process meets nobody, and takes whichever is free.
    """
    if not _in_step():
        return 29500 if world_size > 1 else 0
    return _PORTS[(_integer("SLURM_JOB_ID", default=0) + _integer("SLURM_STEP_ID", default=0)) % len(_PORTS)]


def _ranks_of_node() -> list[int]:
    """The ranks that srun runs on this node; none if it was not srun that started this process."""
    if not _in_step() or "RANK" in os.environ:
        return []
    return [int(rank) for rank in os.environ["SLURM_GTIDS"].split(",")]


def _check_neighbours(ranks: list[int]) -> None:
    if ranks and ranks[-1] - ranks[0] + 1 != len(ranks):
        raise ConfigError(
            f"srun runs ranks {', '.join(map(str, ranks))} on this node, which are no neighbours: a ring would leave "
            "the node at every hop. Start with srun --distribution=block."
        )


def _in_step() -> bool:
    return "SLURM_STEP_ID" in os.environ


def _integer(*names: str, default: int) -> int:
    given = (name for name in names if name in os.environ and (_in_step() or not name.startswith("SLURM_")))
    # OMP_NUM_THREADS may list a number for each nesting level; the outermost comes first.
    return next((int(os.environ[name].split(",")[0]) for name in given), default)
