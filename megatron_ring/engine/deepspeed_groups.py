"""The process groups that DeepSpeed is given: the default one, and its model parallel unit."""

import warnings
from dataclasses import dataclass

import deepspeed
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.rendezvous import join_processes


def start_processes(environment: Environment, device: str) -> None:
    """Initialize torch.distributed: NCCL on CUDA, gloo on CPU. Blocks until all ranks join.

    Raises ConfigError on every rank if one has no GPU (parallel/rendezvous.py).
    """
    # DeepSpeed 0.19.8 still calls collectives by names that torch has deprecated.
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning
    )
    # On a CPU DeepSpeed would spend 20 s here compiling a shared-memory all-reduce, which training
    # never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join_processes(environment, device, default_pg_timeout)
    backend = "nccl" if device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


@dataclass(frozen=True)
class ModelParallelUnit:
    """The groups as DeepSpeed expects them: Megatron-LM's model parallel unit ("mpu").

    Model parallel is the tensor axis, data parallel is data x context.
    """

    tensor: dist.ProcessGroup
    data_context: dist.ProcessGroup

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.tensor)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.tensor)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_context

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data_context)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data_context)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_context)


def model_parallel_unit(grid: Grid, groups: ProcessGroups) -> ModelParallelUnit | None:
    """Return what DeepSpeed's engine needs about the tensor axis; None without one.

    Collective: every rank must call it. DeepSpeed's pipeline module handles both axes itself.
    """
    if grid.tensor == 1 or grid.pipe > 1:
        return None
    data_context = groups.data_context
    if data_context is None:
        alone = [[rank] for rank in range(grid.world_size)]
        data_context, _ = dist.new_subgroups_by_enumeration(alone)
    return ModelParallelUnit(groups.tensor, data_context)
