"""How all ranks join: which GPU each one computes on, and the default process group.

A rank takes the GPU whose index is its local rank. A rank that sees only one GPU takes that one:
srun can show each of its ranks another GPU (--gpus-per-task). Two ranks may have the same GPU only
where NCCL is set to allow it (NCCL_MULTI_RANK_GPU_ENABLE=1, from NCCL 2.30 on).

NCCL needs the GPU of every rank when it starts, so there is no process group yet: the ranks
exchange what they find through the store of torch's rendezvous.
"""

import contextlib
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ring.errors import ConfigError, counted
from megatron_ring.parallel.environment import (
    Environment,
    keep_freed_memory,
    ranks_may_share_gpus,
    rendezvous_address,
    set_gpu_of_libraries,
)
from megatron_ring.parallel.store_probe import WrongAddress, check_resolvable, check_store

TIMEOUT = timedelta(minutes=30)
"""Of the default process group where nothing else sets one; DeepSpeed's default."""


def join_processes(environment: Environment, device: str, timeout: timedelta) -> None:
    """Prepare this process for its device, and join the other ranks. Collective; blocks.

    If the ranks have joined already, as in tests, only the device is selected. Raises ConfigError
    on every rank if one has no GPU.
    """
    environment.complete()
    if device == "cpu":
        torch.set_num_threads(environment.threads)
        keep_freed_memory()
    elif environment.world_size == 1:
        # torch warns that it was given no device_id, but no other rank's device could differ.
        warnings.filterwarnings(
            "ignore", message=r"(barrier\(\): using the device|No device id is provided via)"
        )
    if not dist.is_initialized():
        join(environment, device, timeout)
    elif device == "cuda":
        torch.cuda.set_device(environment.local_rank)


def leave_processes() -> None:
    """Wait for all ranks, then destroy the process groups.

    A rank that exits without waiting can abort the last transfer of another.
    """
    dist.barrier()
    dist.destroy_process_group()


def join(environment: Environment, device: str, timeout: timedelta) -> None:
    """Initialize the default process group: NCCL on CUDA, gloo on a CPU. Collective; blocks.

    ``timeout``: of the group, and of the wait for other ranks. Raises ConfigError on every rank if
    one has no GPU, and on a rank that cannot join the others.

    On CUDA the group is bound to this rank's GPU, on which torch then runs barriers. A bound group
    connects at once, and torch splits off the communicators of later groups, a call of all ranks.
    ``new_group`` makes it on ranks outside of the new group too, even if that uses gloo and its
    members make none: a gloo group must therefore have all ranks. A single rank has nothing to
    connect, and binding it fails on some machines (DeepSpeed's issue 8248).
    """
    with _error_of_this_rank(environment):
        check_resolvable(rendezvous_address())
        if environment.global_rank > 0:
            check_store(rendezvous_address(), environment.world_size, timeout)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
    index = assign_gpu(environment, device, store)
    bound = None
    if device == "cuda":
        set_gpu_of_libraries(index)
        torch.cuda.set_device(index)
        bound = torch.device("cuda", index) if world_size > 1 else None
    with _error_of_this_rank(environment):
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=bound,
        )


@contextlib.contextmanager
def _error_of_this_rank(environment: Environment) -> Iterator[None]:
    """Raise ConfigError for torch's errors about addresses, ports and ranks that do not come."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = ConfigError(_not_joined(environment, error))
        problem.prints_on_every_rank = True  # each rank may fail for another reason, or alone
        raise problem from error


def _not_joined(environment: Environment, error: RuntimeError) -> str:
    address = rendezvous_address()
    rank = f"rank {environment.global_rank} of {environment.world_size}"
    if isinstance(error, WrongAddress):
        return f"{rank} {error}"
    # The stack of C++ follows the message; NCCL's has several lines.
    reason = " ".join(str(error).partition("Exception raised from")[0].split()).rstrip(".")
    if "address already in use" in reason.lower():
        return (
            f"{rank} cannot listen on port {address.port}, which another program uses, perhaps "
            "another run on this host. Set another port: MASTER_PORT, deepspeed --master_port, or "
            "torchrun --master-port."
        )
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    return (
        f"{rank} cannot join the others at {address.host}, port {address.port}: {reason}. Check "
        "that WORLD_SIZE ranks were started, that MASTER_ADDR is the host of rank 0, that no "
        "firewall is between them, and that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if set, "
        f"name interfaces of this host ({interfaces})."
    )


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process sees, in the order of their indices."""
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def assign_gpu(environment: Environment, device: str, store: dist.Store) -> int:
    """Return the index of this rank's GPU; 0 on a CPU. Collective over all ranks; blocks.

    ``device``: "cuda" or "cpu", what this rank would compute on. Raises ConfigError on every rank
    if a host runs more ranks than it has GPUs for, or if only some ranks see a GPU.
    """
    store = dist.PrefixStore("gpu_assignment", store)
    index = 0
    problem = None
    if device == "cuda":
        gpus = visible_gpus()
        index = gpu_index(environment.local_rank, len(gpus), ranks_may_share_gpus())
        is_taken = index is not None and store.add(gpus[index], 1) > 1
        if index is None or (is_taken and not ranks_may_share_gpus()):
            problem = _no_gpu(environment, len(gpus))
    on_cuda = _agree(environment, store, int(device == "cuda"), problem)
    if 0 < on_cuda < environment.world_size:
        raise ConfigError(
            f"{on_cuda} of {environment.world_size} ranks see a GPU, and all must, or none. "
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES on every host, or set "
            "CUDA_VISIBLE_DEVICES= to train on CPUs."
        )
    return index


def gpu_index(local_rank: int, visible: int, may_share: bool) -> int | None:
    """Return the index of the GPU of a rank that sees ``visible`` GPUs; None if it has none."""
    if may_share or visible == 1:
        return local_rank % visible
    return local_rank if local_rank < visible else None


def _no_gpu(environment: Environment, visible: int) -> str:
    """Return why this rank has no GPU of its own, the same text on every such rank of a host."""
    ranks = environment.local_size
    host = socket.gethostname()
    share = "let ranks share a GPU with NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30 or newer)."
    if ranks <= visible:
        return (
            f"two of the {ranks} ranks on {host} have the same one of "
            f"{counted(visible, 'visible GPU')}, whose index is LOCAL_RANK. Give each rank of a "
            f"host its own LOCAL_RANK, or {share}"
        )
    return (
        f"{ranks} ranks run on {host}, but they see {counted(visible, 'GPU')}, and each rank "
        f"needs one of its own. Start at most {visible} there (deepspeed --num_gpus {visible}, "
        f"torchrun --nproc-per-node {visible}, srun --ntasks-per-node {visible}), make more GPUs "
        f"visible (CUDA_VISIBLE_DEVICES), or {share}"
    )


def _agree(environment: Environment, store: dist.Store, uses_gpu: int, problem: str | None) -> int:
    """Return the number of ranks with a GPU, once all ranks have called this.

    Raises ConfigError on every rank if one has a problem.
    """
    if problem:
        store.set("problem", problem)
    store.add("ranks on cuda", uses_gpu)
    if store.add("checked", 1) == environment.world_size:
        store.set("all checked", "")
    store.wait(["all checked"])
    on_cuda = store.add("ranks on cuda", 0)
    found = store.get("problem").decode() if store.check(["problem"]) else None
    # Rank 0 may host the store: it stays until the others have read.
    if store.add("read", 1) == environment.world_size:
        store.set("all read", "")
    if environment.global_rank == 0:
        store.wait(["all read"])
    if found:
        raise ConfigError(found)
    return on_cuda
