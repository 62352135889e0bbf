"""Allocates only a rank's own partitions of parameters under ZeRO 3, never a whole one."""

from collections.abc import Callable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.settings.run_settings import RunSettings

# Settings of ZeRO 3 under which DeepSpeed keeps partitions of another kind or a second one.
_OTHER_PARTITIONS = {
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
}


def zero3_partitioner(
    setup: RunSettings, groups: ProcessGroups
) -> Callable[[torch.nn.Parameter], tuple[torch.Tensor, int]] | None:
    """Return a function that partitions an unallocated parameter for ZeRO 3; None: DeepSpeed does.

    DeepSpeed partitions a parameter that exists whole on every rank. The returned function takes
    one with a shape and a type but no memory, and allocates this rank's partition where DeepSpeed
    would. It returns the partition without its padding, and the index of its first element in the
    flattened parameter.
    """
    zero = setup.deepspeed["zero_optimization"]
    if zero["stage"] != 3 or setup.grid.data_context == 1 or zero.keys() & _OTHER_PARTITIONS:
        return None
    offload = zero.get("offload_param", {})
    partitions = deepspeed.zero.Init(
        data_parallel_group=groups.data_context if setup.grid.tensor > 1 else None,
        remote_device=offload.get("device"),
        pin_memory=offload.get("pin_memory", False),
        dtype=setup.precision.dtype,
    )
    # As Init does for a module: under ZeRO 3 every linear layer is DeepSpeed's.
    if zero.get("memory_efficient_linear", True):
        partitions._enable_mem_efficient_linear()

    def partition(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
        partitions._convert_to_deepspeed_param(parameter)
        parameter.ds_numel_aligned = parameter.aligned_size()
        length = parameter.ds_numel_aligned // parameter.ds_zero_partition_world_size
        device = partitions.local_device if parameter.ds_persist else partitions.remote_device
        owned = torch.zeros(length, dtype=parameter.dtype, device=torch.device(device))
        if partitions.pin_memory and owned.device.type == "cpu":
            owned = get_accelerator().pin_memory(owned)
        owned.ds_numel = length
        owned.status = PartitionedParamStatus.AVAILABLE
        owned.final_location = None
        parameter.ds_tensor = owned
        parameter.partition()  # frees the data, of which a partition exists
        start = length * parameter.ds_zero_partition_rank
        return owned[: max(0, min(length, parameter.ds_numel - start))], start

    return partition
