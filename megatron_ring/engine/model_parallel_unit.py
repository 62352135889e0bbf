"""The groups in the words in which DeepSpeed asks for them: Megatron's "model parallel unit"."""

from dataclasses import dataclass

import torch.distributed as dist

from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid


def model_parallel_unit(grid: Grid, groups: ProcessGroups) -> "ModelParallelUnit | None":
    """What tells DeepSpeed's engine of the tensor axis; None where there is none.

    Every process calls it in the same place. A pipeline's module tells of both axes itself.
    """
    if grid.tensor == 1 or grid.pipe > 1:
        return None
    data_context = groups.data_context
    if data_context is None:
        data_context, _ = dist.new_subgroups_by_enumeration(
            [[rank] for rank in range(grid.world_size)]
        )
    return ModelParallelUnit(groups.tensor, data_context)


@dataclass(frozen=True)
class ModelParallelUnit:
    """Model parallel is the tensor axis, data parallel is data x context."""

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
