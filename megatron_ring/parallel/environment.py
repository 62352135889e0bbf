"""What the launcher says of this process. The one file that reads ``os.environ``.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM's names; alone, a process is
the whole world. A batch script carries SLURM's names too, but only within a step of srun do they count processes.
The ranks of a step meet on its first node, at a port of their own, unless MASTER_ADDR and MASTER_PORT say where.
A variable that is set but empty, as compose files and wrapper scripts export them, counts as unset.
"""

import contextlib
import ctypes
import os
import random
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ring.errors import ConfigError

# Variables of launchers and of the libraries that training uses. CUDA_VISIBLE_DEVICES is not one
# of them: set but empty, it means that no device may be used.
_NAMES = ("RANK", "WORLD_SIZE")
_PREFIXES = (
    "CUBLAS_",
    "DEEPSPEED_",
    "DS_",
    "GLIBC_TUNABLES",
    "GLOO_",
    "HF_",
    "KMP_",
    "LOCAL_",
    "MALLOC_",
    "MASTER_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "SLURM_",
    "TORCH",
    "TRITON_",
    "WANDB_",
)


def remove_empty_variables() -> None:
    """Remove those variables of launchers and libraries that are set but empty.

    Libraries read them while they are imported, and some fail on an empty one: DeepSpeed does on
    DEEPSPEED_TIMEOUT and DS_ACCELERATOR. So the package calls this before it imports any library.
    """
    for name, value in list(os.environ.items()):
        if not value and (name in _NAMES or name.startswith(_PREFIXES)):
            del os.environ[name]


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
        """The launcher's variables. Raises ConfigError for those that are no numbers or out of range."""
        world_size = _integer("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
        # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = _integer(
            "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=len(_ranks_of_node()) or world_size
        )
        own_cores = max(1, len(os.sched_getaffinity(0)) // max(1, local_size))
        environment = Environment(
            global_rank=_integer("RANK", "SLURM_PROCID", default=0),
            local_rank=_integer("LOCAL_RANK", "SLURM_LOCALID", default=0),
            world_size=world_size,
            local_size=local_size,
            threads=_integer("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", default=own_cores),
        )
        if problems := environment._problems():
            raise ConfigError(problems)
        return environment

    def _problems(self) -> list[str]:
        rules = {
            f"WORLD_SIZE is {self.world_size}, and must be at least 1": self.world_size >= 1,
            f"LOCAL_WORLD_SIZE is {self.local_size}, and must be at least 1": self.local_size >= 1,
            f"LOCAL_RANK is {self.local_rank}, and must be at least 0": self.local_rank >= 0,
            f"RANK is {self.global_rank}, and must be at least 0 and below WORLD_SIZE {self.world_size}": (
                0 <= self.global_rank < max(1, self.world_size)
            ),
            f"OMP_NUM_THREADS is {self.threads}, and must be at least 1": self.threads >= 1,
        }
        return [f"{rule}. Set it, or unset it." for rule, holds in rules.items() if not holds]

    def complete(self) -> None:
        """Give torch's rendezvous what the launcher left out, so that a bare ``python`` is a world of one.

        Raises ConfigError where srun dealt out the ranks so that rings would leave the nodes at
        every hop, and where MASTER_PORT is no port.
        """
        _check_neighbours(_ranks_of_node())
        _set_default("RANK", str(self.global_rank))
        _set_default("LOCAL_RANK", str(self.local_rank))
        _set_default("WORLD_SIZE", str(self.world_size))
        nodes = _value("SLURM_STEP_NODELIST") if _in_step() else None
        _set_default("MASTER_ADDR", first_host(nodes) if nodes else "127.0.0.1")
        _set_default("MASTER_PORT", str(_port(self.world_size)))
        port = _integer("MASTER_PORT", default=0)
        if not 0 <= port < 2**16:
            raise ConfigError(
                f"MASTER_PORT is {port}, and must be from 0 to {2**16 - 1}. Set it, or unset it."
            )


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
    "NCCL_NVLS_ENABLE": (
        "0",
    ),  # sums that NVLink's switches take, which differ from call to call (NVIDIA/nccl#1497)
}


def fix_order_of_sums() -> None:
    """Have cuBLAS and NCCL repeat themselves. They read it as they start, so it must come before both.

    Raises ConfigError where the environment says otherwise.
    """
    problems = [
        f"deterministic needs {name} to be {' or '.join(legal)}, and the environment has {os.environ[name]}. "
        f"Unset {name}, or leave --deterministic out."
        for name, legal in _FIXED_ORDER.items()
        if (_value(name) or legal[0]) not in legal
    ]
    if problems:
        raise ConfigError(problems)
    for name, (first, *_) in _FIXED_ORDER.items():
        _set_default(name, first)


# By their numbers in glibc's malloc.h, and what the environment may say of them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOC_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, where the environment does not say how it should be.

    By itself it gives tensors of 32 MB and more back at once, and takes each anew, page by page (docs/decisions/0021).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt and not any(_value(name) for name in _MALLOC_SETTINGS):
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
    return _PORTS[
        (_integer("SLURM_JOB_ID", default=0) + _integer("SLURM_STEP_ID", default=0)) % len(_PORTS)
    ]


def socket_interfaces(names: Sequence[str]) -> list[str]:
    """Those of this host's network interfaces that the environment names for gloo, then for NCCL.

    GLOO_SOCKET_IFNAME lists names. NCCL_SOCKET_IFNAME lists beginnings of names; after ``=`` whole
    names, after ``^`` what to leave out.
    """
    wanted = [name for name in (_value("GLOO_SOCKET_IFNAME") or "").split(",") if name in names]
    rule = _value("NCCL_SOCKET_IFNAME")
    if rule is None:
        return wanted
    parts = tuple(part for part in rule.lstrip("^=").split(",") if part)
    if "=" in rule[:2]:
        matching = [name for name in names if name in parts]
    else:
        matching = [name for name in names if name.startswith(parts)]
    return wanted + ([n for n in names if n not in matching] if rule[0] == "^" else matching)


def master_address() -> str:
    """The host on which the ranks meet."""
    return _value("MASTER_ADDR") or "127.0.0.1"


def _ranks_of_node() -> list[int]:
    """The ranks that srun runs on this node; none if it was not srun that started this process."""
    ranks = _value("SLURM_GTIDS") if _in_step() and not _value("RANK") else None
    return [_whole_number("SLURM_GTIDS", rank) for rank in ranks.split(",")] if ranks else []


def _check_neighbours(ranks: list[int]) -> None:
    if ranks and ranks[-1] - ranks[0] + 1 != len(ranks):
        raise ConfigError(
            f"srun runs ranks {', '.join(map(str, ranks))} on this node, which are no neighbours: a ring would leave "
            "the node at every hop. Start with srun --distribution=block."
        )


def _in_step() -> bool:
    return _value("SLURM_STEP_ID") is not None


def _integer(*names: str, default: int) -> int:
    """The first of the variables that is set; SLURM's only within a step of srun."""
    for name in names:
        value = _value(name)
        if value is not None and (_in_step() or not name.startswith("SLURM_")):
            # OMP_NUM_THREADS may list a number for each nesting level; the outermost comes first.
            return _whole_number(name, value.split(",")[0] if name == "OMP_NUM_THREADS" else value)
    return default


def _whole_number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(
            f"{name} is {value[:80]!r}, and must be a whole number. Set it, or unset it."
        ) from None


def _value(name: str) -> str | None:
    """The variable's value; None where it is unset or empty."""
    return os.environ.get(name) or None


def _set_default(name: str, value: str) -> None:
    if _value(name) is None:
        os.environ[name] = value
