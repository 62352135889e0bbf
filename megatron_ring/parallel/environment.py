"""The launcher's environment variables. This is the only module that reads ``os.environ``.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM's variables;
without a launcher the world size is 1. A batch script has SLURM's variables too, but they count
processes only within a step of srun. The rendezvous of a step's ranks is on its first node, at a
port of its own, unless MASTER_ADDR and MASTER_PORT are set. A variable that is set but empty, as
exported by compose files and wrapper scripts, counts as unset.
"""

import contextlib
import ctypes
import os
import random
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ring.errors import ConfigError, counted

# Variables of launchers and of the libraries that training uses. CUDA_VISIBLE_DEVICES is not among
# them: set but empty, it means that no device may be used.
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


# OpenMP starts as many threads as it is asked for, or hangs.
_MAX_THREADS = 8192


def remove_empty_variables() -> None:
    """Remove variables of launchers and libraries that are set but empty.

    Libraries read them on import, and some fail on an empty one: DeepSpeed does on
    DEEPSPEED_TIMEOUT and DS_ACCELERATOR. So the package calls this before it imports any library.
    """
    for name, value in list(os.environ.items()):
        if not value and (name in _NAMES or name.startswith(_PREFIXES)):
            del os.environ[name]


@dataclass(frozen=True)
class Environment:
    """This process's rank and resources.

    Attributes:
        global_rank: rank among all ``world_size`` processes.
        local_rank: rank among the ``local_size`` processes of this machine.
        threads: threads to compute with on a CPU: OMP_NUM_THREADS if set, else the CPUs per task
            of srun, else this process's share of the cores, so that ranks of one machine do not
            compete for them.
    """

    global_rank: int
    local_rank: int
    world_size: int
    local_size: int
    threads: int

    @staticmethod
    def read() -> "Environment":
        """Read the launcher's variables.

        Raises ConfigError for variables that are not numbers or out of range.
        """
        world_size = _integer("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
        # deepspeed sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
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
            f"RANK is {self.global_rank}, and must be at least 0 "
            f"and below WORLD_SIZE {self.world_size}": (
                0 <= self.global_rank < max(1, self.world_size)
            ),
            f"OMP_NUM_THREADS is {self.threads}, and must be from 1 to {_MAX_THREADS}": (
                1 <= self.threads <= _MAX_THREADS
            ),
        }
        return [f"{rule}. Set it, or unset it." for rule, holds in rules.items() if not holds]

    def complete(self) -> None:
        """Set the variables of torch's rendezvous that the launcher left out.

        Without a launcher, plain ``python`` then runs with a world size of 1. Raises ConfigError if
        srun distributed the ranks so that rings would leave the node in every hop, or if
        MASTER_PORT is not a port.
        """
        _check_consecutive(_ranks_of_node())
        _set_default("RANK", str(self.global_rank))
        _set_default("LOCAL_RANK", str(self.local_rank))
        _set_default("WORLD_SIZE", str(self.world_size))
        nodes = _value("SLURM_STEP_NODELIST") if _in_step() else None
        _set_default("MASTER_ADDR", first_host(nodes) if nodes else "127.0.0.1")
        _set_default("MASTER_PORT", str(_port(self.world_size)))
        port = _integer("MASTER_PORT", default=0)
        # Port 0 is any free port, which the other ranks could not know.
        lowest = 0 if self.world_size == 1 else 1
        if not lowest <= port < 2**16:
            raise ConfigError(
                f"MASTER_PORT is {port}, and must be from {lowest} to {2**16 - 1} with "
                f"{counted(self.world_size, 'rank')}. Set it, or unset it."
            )


def slurm_job() -> tuple[str, int]:
    """Return the id of this process's SLURM job, "" without one, and how often it was requeued."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdecimal() else 0


def launched_by_deepspeed() -> bool:
    """Return whether DeepSpeed's node launcher started this process.

    No other launcher sets this combination of variables.
    """
    return {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def launched_by_torchelastic() -> bool:
    """Return whether torchrun, or another program with torch's elastic agent, is the launcher."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def ranks_may_share_gpus() -> bool:
    """Return whether NCCL is set to let several ranks compute on one GPU."""
    return (_value("NCCL_MULTI_RANK_GPU_ENABLE") or "0") != "0"


def set_gpu_of_libraries(index: int) -> None:
    """Make DeepSpeed, which reads LOCAL_RANK, use the GPU of that index."""
    os.environ["LOCAL_RANK"] = str(index)


# Values with which a library accumulates in the same order in every call; the first is the default.
_DETERMINISTIC_VALUES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NVLink SHARP: sums computed by the switches differ from call to call (NVIDIA/nccl#1497).
    "NCCL_NVLS_ENABLE": ("0",),
}


def fix_reduction_order() -> None:
    """Make cuBLAS and NCCL deterministic; must be called before either starts.

    Raises ConfigError if the environment sets other values.
    """
    problems = [
        f"deterministic needs {name} to be {' or '.join(legal)}, "
        f"and the environment has {os.environ[name]}. "
        f"Unset {name}, or leave --deterministic out."
        for name, legal in _DETERMINISTIC_VALUES.items()
        if (_value(name) or legal[0]) not in legal
    ]
    if problems:
        raise ConfigError(problems)
    for name, (first, *_) in _DETERMINISTIC_VALUES.items():
        _set_default(name, first)


# Constants of glibc's malloc.h, and the variables by which a user may set the same parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MALLOC_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it, unless the environment configures it.

    By default it returns tensors of 32 MB and more to the system at once, and allocates each one
    anew, page by page (docs/decisions/0021).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
    if mallopt and not any(_value(name) for name in _MALLOC_SETTINGS):
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)  # the largest int
        mallopt(_M_TRIM_THRESHOLD, -1)  # never trim


def first_host(node_list: str) -> str:
    """Return the first host of SLURM's compressed node list.

    >>> first_host("node[01-03,7],other"), first_host("gpu1,gpu2")
    ('node01', 'gpu1')
    >>> first_host("rack[2,4]-node[5-6]")
    'rack2-node5'
    """
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", node_list).group()
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)


# Below the ephemeral ports, so that no connection takes one before a process listens on it.
_PORTS = range(15000, 30000)


def free_port() -> int:
    """Return a free port of this machine for the rendezvous of processes that this one starts."""
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError(f"every port of {_PORTS.start} to {_PORTS.stop - 1} is in use")


def _port(world_size: int) -> int:
    """Return the rendezvous port: within a step of srun, one derived from the job and the step.

    Jobs that share a node must have different ones. A single process needs none and takes any.
    """
    if not _in_step():
        return 29500 if world_size > 1 else 0
    number = _integer("SLURM_JOB_ID", default=0) + _integer("SLURM_STEP_ID", default=0)
    return _PORTS[number % len(_PORTS)]


def socket_interfaces(names: Sequence[str]) -> list[str]:
    """Return those of this host's network interfaces that are set for gloo, then those for NCCL.

    GLOO_SOCKET_IFNAME lists names. NCCL_SOCKET_IFNAME lists prefixes of names; after ``=`` whole
    names, after ``^`` exclusions.
    """
    gloo = [name for name in (_value("GLOO_SOCKET_IFNAME") or "").split(",") if name in names]
    rule = _value("NCCL_SOCKET_IFNAME")
    if rule is None:
        return gloo
    listed = tuple(part for part in rule.lstrip("^=").split(",") if part)
    if "=" in rule[:2]:
        matching = [name for name in names if name in listed]
    else:
        matching = [name for name in names if name.startswith(listed)]
    if rule[0] == "^":
        return gloo + [name for name in names if name not in matching]
    return gloo + matching


class RendezvousAddress(NamedTuple):
    """Where the ranks join: the host of rank 0, and a port as text."""

    host: str
    port: str


def rendezvous_address() -> RendezvousAddress:
    """Return the host and port of the rendezvous; the port is "" before ``complete``."""
    return RendezvousAddress(master_address(), _value("MASTER_PORT") or "")


def master_address() -> str:
    """Return the host of the rendezvous."""
    return _value("MASTER_ADDR") or "127.0.0.1"


def _ranks_of_node() -> list[int]:
    """Return the ranks that srun runs on this node; none if another launcher is in use."""
    ranks = _value("SLURM_GTIDS") if _in_step() and not _value("RANK") else None
    return [_whole_number("SLURM_GTIDS", rank) for rank in ranks.split(",")] if ranks else []


def _check_consecutive(ranks: list[int]) -> None:
    if ranks and ranks[-1] - ranks[0] + 1 != len(ranks):
        raise ConfigError(
            f"srun runs ranks {', '.join(map(str, ranks))} on this node, which are not "
            "consecutive: a ring would leave the node in every hop. "
            "Start with srun --distribution=block."
        )


def _in_step() -> bool:
    """Return whether this process runs in a step of srun."""
    return _value("SLURM_STEP_ID") is not None


def _integer(*names: str, default: int) -> int:
    """Return the first of the variables that is set; SLURM's count only within a step of srun."""
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
    """Return the variable's value; None if it is unset or empty."""
    return os.environ.get(name) or None


def _set_default(name: str, value: str) -> None:
    if _value(name) is None:
        os.environ[name] = value
