"""Fragments: what this process holds of each parameter in float32, with Adam's moments, wherever DeepSpeed keeps it.

A fragment is a run of the flattened part that a tensor rank has of a parameter. It has views into the engine's own
memory: what is read there is saved, what is written there is loaded. The way to them differs by what DeepSpeed does:

    ZeRO 3                     a run of equal length on every rank, in the flat tensor of a group
    ZeRO 1 and 2, bf16 stages  what falls into this rank's slice of all parameters laid end to end; often nothing
    half precision alone       a float32 copy of every parameter
    float32 alone              the parameter itself
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_ring.checkpoint import boxes
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.checkpoint.finite import count_not_finite
from megatron_ring.checkpoint.tensors import MOMENTS, WEIGHT, Piece, Tensors
from megatron_ring.parallel.tensor import part_shape, split_of


class Place(NamedTuple):
    """Where a fragment is: ``length`` elements from ``start`` on of a flattened parameter, at ``offset`` in ``held``.

    ``held`` is what the optimizer updates: it has the optimizer's state. ``copied``: every data x context rank has it.
    """

    held: torch.Tensor
    offset: int
    start: int
    length: int
    copied: bool = False


@dataclass(frozen=True)
class Fragment:
    """A run of parameter ``name``: elements ``start`` and on of ``part``, its tensor rank's box, flattened.

    copied: every data x context rank holds it. values: of each kind a flat float32 view into the engine's memory.
    """

    name: str
    part: Box
    start: int
    copied: bool
    values: dict[str, torch.Tensor]

    def share(self, rank: int, ranks: int) -> Iterator[Piece]:
        """What ``rank`` of the ``ranks`` over data x context saves of it: all, or its share of what they all have."""
        length = len(self.values[WEIGHT])
        if not self.copied:
            return self._pieces(0, length)
        return self._pieces(length * rank // ranks, length * (rank + 1) // ranks)

    def fill(self, tensors: Tensors, kinds: Iterable[str]) -> dict[str, int]:
        """Read what belongs here from a checkpoint of any borders.

        Returns how many of its values are nan or infinite, for each of ``kinds`` that has any.
        """
        for piece in self._pieces(0, len(self.values[WEIGHT])):
            for kind in kinds:
                tensors.read_into(piece.values[kind], piece.name, kind, piece.box)
        counts = {kind: count_not_finite(self.values[kind]) for kind in kinds}
        return {kind: count for kind, count in counts.items() if count}

    def _pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Elements ``first`` to ``last`` of this fragment, as boxes of the whole parameter."""
        for box in boxes.cut(tuple(map(len, self.part)), self.start + first, self.start + last):
            run = slice(first, first + boxes.size(box))
            views = {kind: flat[run].view(*map(len, box)) for kind, flat in self.values.items()}
            yield Piece(self.name, boxes.moved(box, self.part), views)
            first = run.stop


def fragments(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: Any, adam: torch.optim.Optimizer
) -> list[Fragment]:
    """What this process holds of the parameters ``named`` as in a whole GPT.

    ``optimizer`` is DeepSpeed's, around ``adam``, or ``adam`` itself.
    """
    where = _places(optimizer, adam)
    return [
        _fragment(name, p, place, adam) for name, p in named if (place := where(p)) and place.length
    ]


def _fragment(
    name: str, parameter: nn.Parameter, place: Place, adam: torch.optim.Optimizer
) -> Fragment:
    split = split_of(parameter)
    part = tuple(
        split.indices if split and dim == split.dim else range(n)
        for dim, n in enumerate(part_shape(parameter))
    )
    kept = {WEIGHT: place.held, **_moments(adam, place.held)}
    run = slice(place.offset, place.offset + place.length)
    values = {kind: x.detach().view(-1)[run] for kind, x in kept.items()}
    return Fragment(name, part, place.start, place.copied, values)


def _moments(adam: torch.optim.Optimizer, held: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's state, made as Adam makes it if there has been no step."""
    state = adam.state[held]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)
        state.update({kind: torch.zeros_like(held, requires_grad=False) for kind in MOMENTS})
    return {kind: state[kind] for kind in MOMENTS}


def _places(optimizer: Any, adam: torch.optim.Optimizer) -> Callable[[nn.Parameter], Place | None]:
    """What finds the place of a parameter; None for one of which this process holds nothing."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return lambda p: _place_in_zero_3(p, optimizer)
    if hasattr(optimizer, "fp16_groups"):
        copies = dict(_copies(optimizer))
        return lambda p: Place(copies[p], 0, 0, p.numel(), copied=True)
    if optimizer is adam:
        return lambda p: Place(p, 0, 0, p.numel(), copied=True)
    return lambda p: _place_in_slice(p, adam)


def _place_in_zero_3(parameter: nn.Parameter, optimizer: Any) -> Place:
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = padded * optimizer._get_param_partition_rank(parameter)
    length = max(0, min(padded, parameter.ds_numel - start))
    return Place(optimizer.fp32_partitioned_groups_flat[group], offset, start, length)


def _place_in_slice(parameter: nn.Parameter, adam: torch.optim.Optimizer) -> Place | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    [held] = adam.param_groups[mapping.param_group_index]["params"]
    run = mapping.lp_fragment_address
    return Place(held, mapping.hp_fragment_address.start, run.start, run.numel)


def _copies(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    return zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)


def update_compute_weights(optimizer: Any) -> None:
    """Have the weights that compute follow the float32 ones, which were written to; collective."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "fp16_groups"):
        for half, single in _copies(optimizer):
            half.copy_(single)


_COUNTED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale(optimizer: Any) -> dict[str, float]:
    """What ``optimizer``'s scaler has counted; nothing in other types, whose losses are not scaled."""
    return {name: value for name, value in _state(optimizer).items() if name in _COUNTED}


def set_loss_scale(optimizer: Any, counted: dict[str, float]) -> None:
    """Go on from what ``loss_scale`` gave; without effect in other types."""
    _state(optimizer).update(counted)


def _state(optimizer: Any) -> dict[str, Any]:
    """The attributes of its scaler, where that adapts; ZeRO and the half-precision optimizers name theirs apart."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(
        optimizer, "loss_scale_config", None
    )
    adapts = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return vars(scaler) if adapts else {}
