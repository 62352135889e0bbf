"""Allocation and initial values of parameters, after a module was built on the meta device.

The initial value of a parameter is a function of the seed and of its full name, so it depends
neither on the process grid nor on the order of initialization. A generator per parameter draws the
whole tensor in float32 on the CPU, in blocks of rows of at most about 16 MiB, and a rank stores
only the elements it owns: its tensor-parallel part, and of that its ZeRO 3 partition. A rank
therefore allocates what it keeps plus a few blocks.

Matrices are drawn from normal(0, init_method_std). The two projections of a block that write into
the residual stream have this deviation times 1 / sqrt(2 x num_layers), so that the variance of the
stream does not grow with depth (Radford et al. 2019, GPT-2, section 2.3). Norms start as the
identity and biases at zero. The scores of attention sinks start at zero as well, which makes the
softmax off-by-one; Megatron-LM and transformers' gpt-oss draw them from the same normal
distribution, but heads do not need it to break symmetry.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.parallel.tensor import (
    Split,
    all_reduce_replicated_grads,
    part_shape,
    split_of,
    whole_shape,
)

RESIDUAL_PROJECTIONS = ("attention.out_proj.weight", "mlp.down_proj.weight")
BLOCK_ELEMENTS = 1 << 22
"""How many numbers to draw at a time: 16 MiB of float32."""

_ROWS_PER_STEP = 16

M = TypeVar("M", bound=nn.Module)
Allocate = Callable[[torch.Size, torch.dtype, torch.device], torch.Tensor]
OwnedElements = Callable[[nn.Parameter], tuple[torch.Tensor, int]]


def build(
    module_type: Callable[..., M],
    config: ModelConfig,
    *args: object,
    seed: int,
    prefix: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    partition: OwnedElements | None = None,
    **options: object,
) -> M:
    """Return an initialized ``module_type(config, *args, **options)``, which must have ``tensor``.

    ``prefix`` and a parameter's name in the module make up its name in a whole GPT. ``partition``
    replaces a parameter that has no memory by this rank's ZeRO 3 partition, which it returns as
    ``initialize`` describes; None: the rank stores its whole tensor-parallel part.
    """
    with torch.device("meta"):
        module = module_type(config, *args, **options)
    if partition is None:
        materialize(module, device, dtype)
        initialize(module, config, seed, prefix)
    else:
        materialize(module, device, dtype, allocate=_without_memory)
        initialize(module, config, seed, prefix, partition)
    return module


def materialize(
    module: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    allocate: Allocate | None = None,
) -> None:
    """Replace every parameter and buffer of ``module``, which is on the meta device.

    Parameters become uninitialized tensors of ``dtype`` on ``device`` and keep their attributes.
    Gradients of replicated parameters are summed over ``module.tensor`` from now on. Buffers keep
    their type and become zeros: attention sinks with a fixed score of 0 are the only buffers.

    ``allocate`` returns the tensor of a parameter by shape, type and device; ``torch.empty`` by
    default.
    """
    device = torch.device(device)
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            allocated = (allocate or _empty)(parameter.shape, dtype, device)
            replacement = nn.Parameter(allocated, parameter.requires_grad)
            vars(replacement).update(vars(parameter))
            setattr(child, name, replacement)
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, torch.zeros_like(buffer, device=device))
    all_reduce_replicated_grads(module, module.tensor)


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _without_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of ``shape`` all of whose elements are the same number in memory."""
    return torch.empty(1, dtype=dtype, device=device).expand(shape)


def _all_elements(parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
    return parameter.data.view(-1), 0


@torch.no_grad()
def initialize(
    module: nn.Module,
    config: ModelConfig,
    seed: int,
    prefix: str = "",
    owned: OwnedElements = _all_elements,
) -> None:
    """Write the initial value of every parameter of ``module``, in place.

    ``owned`` returns, for a parameter, a flat view of the elements that this rank stores and the
    index of the first of them in this tensor rank's flattened part. By default a rank stores the
    whole part; under ZeRO 3 it stores a partition of it.
    """
    for name, parameter in list(module.named_parameters(prefix)):
        whole = whole_shape(parameter)
        split = split_of(parameter)
        elements_per_row = math.prod(part_shape(parameter)[1:])
        stored, first = owned(parameter)
        constant = _constant(name)
        if constant is not None:
            stored.fill_(constant)
            continue
        deviation = _deviation(name, config)
        for row, block in random_blocks(whole, _generator(name, seed)):
            part, part_row = _tensor_part(block.mul_(deviation), row, split)
            start = part_row * elements_per_row
            _copy_overlap(part.flatten(), start, stored, first)
            if start + part.numel() >= first + len(stored):
                break


def random_blocks(
    shape: tuple[int, ...],
    generator: torch.Generator,
    block_elements: int = BLOCK_ELEMENTS,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows) of ``torch.randn(shape, generator=generator)`` in blocks of rows.

    The values are those of a single call, bit for bit. On a CPU, torch fills 16 numbers or more
    with the Box-Muller transform in groups of 16, each from 16 numbers of the stream; if the count
    is no multiple of 16, it redraws the last 16. Blocks of 16 rows, and a last block of at least
    16 unless the tensor is smaller, therefore consume the stream as one call does. A block has at
    most ``block_elements`` numbers, or 16 rows if these are more; the last may have 15 rows more.
    """
    count = shape[0]
    steps_per_block = block_elements // max(_ROWS_PER_STEP * math.prod(shape[1:]), 1)
    rows_per_block = _ROWS_PER_STEP * max(steps_per_block, 1)
    row = 0
    while row < count:
        rows = rows_per_block if count - row >= rows_per_block + _ROWS_PER_STEP else count - row
        yield row, torch.randn((rows, *shape[1:]), generator=generator)
        row += rows


def _constant(name: str) -> float | None:
    """Return the initial value of all elements, or None for a parameter that is drawn."""
    if name.endswith((".bias", ".sink_H")):
        return 0.0
    return 1.0 if name.endswith("norm.weight") else None


def _deviation(name: str, config: ModelConfig) -> float:
    if name.endswith(RESIDUAL_PROJECTIONS):
        return config.init_method_std / (2 * config.num_layers) ** 0.5
    return config.init_method_std


def _tensor_part(block: torch.Tensor, row: int, split: Split | None) -> tuple[torch.Tensor, int]:
    """Return this tensor rank's part of a block that begins at ``row``, and its first row there."""
    if split is None:
        return block, row
    if split.dim == 1:
        return block[:, split.indices.start : split.indices.stop], row
    first = max(row, split.indices.start)
    stop = max(first, min(row + len(block), split.indices.stop))
    return block[first - row : stop - row], first - split.indices.start


def _copy_overlap(
    source: torch.Tensor, source_start: int, target: torch.Tensor, target_start: int
) -> None:
    """Copy the elements that two runs of the same flat tensor have in common."""
    start = max(source_start, target_start)
    stop = min(source_start + len(source), target_start + len(target))
    if start < stop:
        target[start - target_start : stop - target_start].copy_(
            source[start - source_start : stop - source_start]
        )


def _generator(name: str, seed: int) -> torch.Generator:
    """Return a generator seeded by a digest of seed and name.

    32 bits, because torch's CPU generator reads no more; sha256, because ``hash`` differs between
    processes.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
