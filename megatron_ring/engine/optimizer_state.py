"""Views into DeepSpeed's fp32 weights, Adam moments and loss scale, to save and load them.

A ``Fragment`` is a contiguous range of the flattened part of a parameter that a tensor rank holds.
Its tensors are views into the engine's own memory: saving reads them, loading writes them. Where
DeepSpeed keeps the fp32 values depends on the optimizer that it has built:

    ZeRO 3                     a range of equal length on every rank, in one flat tensor a group
    ZeRO 1 and 2, bf16 stages  what falls into this rank's slice of all parameters laid end to end;
                               often nothing
    half precision, no ZeRO    an fp32 copy of every parameter
    fp32, no ZeRO              the parameter itself

DeepSpeed has no public interface for this. The private attributes read here are those of DeepSpeed
0.19.8, described where they are used. When a new version changes one, tests/training/test_resume.py
fails, which saves and loads under every one of these optimizers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_ring.checkpoint import boxes
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.checkpoint.finite import count_non_finite
from megatron_ring.checkpoint.tensors import MOMENTS, WEIGHT, Piece, Tensors
from megatron_ring.parallel.tensor import part_shape, split_of

# The loss scaler's attributes that change during a run. They are also the keys in a checkpoint.
_LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _Location(NamedTuple):
    """Where a fragment's fp32 values are in DeepSpeed's memory.

    ``length`` elements of the flattened parameter from element ``start`` on, stored in ``held``
    from ``offset`` on. ``held`` is the tensor that Adam updates and keeps its state for.
    ``replicated``: every data x context rank has these elements.
    """

    held: torch.Tensor
    offset: int
    start: int
    length: int
    replicated: bool = False


@dataclass(frozen=True)
class Fragment:
    """Elements from ``start`` on of ``part``, a tensor rank's box of parameter ``name``, flattened.

    replicated: every data x context rank holds it. values: for each kind (weight, moments) a flat
    fp32 view into the engine's memory.
    """

    name: str
    part: Box
    start: int
    replicated: bool
    values: dict[str, torch.Tensor]

    def pieces_to_save(self, rank: int, ranks: int) -> Iterator[Piece]:
        """Return what ``rank`` of ``ranks`` data x context ranks saves of this fragment.

        That is all of it, or an equal share where every rank holds it.
        """
        length = len(self.values[WEIGHT])
        if not self.replicated:
            return self._pieces(0, length)
        return self._pieces(length * rank // ranks, length * (rank + 1) // ranks)

    def load(self, tensors: Tensors, kinds: Iterable[str]) -> dict[str, int]:
        """Read this fragment from a checkpoint written on any grid.

        Returns the number of values that are nan or infinite, for each of ``kinds`` that has any.
        """
        for piece in self._pieces(0, len(self.values[WEIGHT])):
            for kind in kinds:
                tensors.read_into(piece.values[kind], piece.name, kind, piece.box)
        counts = {kind: count_non_finite(self.values[kind]) for kind in kinds}
        return {kind: count for kind, count in counts.items() if count}

    def _pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Yield elements ``first`` to ``last`` of this fragment as boxes of the whole parameter."""
        part_shape = tuple(map(len, self.part))
        for box in boxes.cut(part_shape, self.start + first, self.start + last):
            elements = slice(first, first + boxes.size(box))
            box_shape = tuple(map(len, box))
            views = {kind: flat[elements].view(box_shape) for kind, flat in self.values.items()}
            yield Piece(self.name, boxes.moved(box, self.part), views)
            first = elements.stop


def fragments(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: Any,
    adam: torch.optim.Optimizer,
) -> list[Fragment]:
    """Return what this process holds of the parameters, which are named as in a whole GPT.

    ``optimizer`` is DeepSpeed's optimizer around ``adam``, or ``adam`` itself.
    """
    locate = _locator(optimizer, adam)
    found = []
    for name, parameter in named_parameters:
        location = locate(parameter)
        if location and location.length:
            found.append(_fragment(name, parameter, location, adam))
    return found


def _fragment(
    name: str, parameter: nn.Parameter, location: _Location, adam: torch.optim.Optimizer
) -> Fragment:
    split = split_of(parameter)
    part = [range(size) for size in part_shape(parameter)]
    if split:
        part[split.dim] = split.indices
    elements = slice(location.offset, location.offset + location.length)
    held = {WEIGHT: location.held, **_moments(adam, location.held)}
    values = {kind: tensor.detach().view(-1)[elements] for kind, tensor in held.items()}
    return Fragment(name, tuple(part), location.start, location.replicated, values)


def _moments(adam: torch.optim.Optimizer, held: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return Adam's moments of ``held``, created as Adam does if there has been no step yet."""
    state = adam.state[held]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)
        state.update({kind: torch.zeros_like(held, requires_grad=False) for kind in MOMENTS})
    return {kind: state[kind] for kind in MOMENTS}


def _locator(
    optimizer: Any, adam: torch.optim.Optimizer
) -> Callable[[nn.Parameter], _Location | None]:
    """Return the function that locates a parameter; it returns None if this rank holds no part.

    The optimizers are distinguished by attributes that only one of them has in DeepSpeed 0.19.8. If
    DeepSpeed renames one, the lookup fails with an AttributeError.
    """
    # DeepSpeedZeroOptimizer_Stage3 (deepspeed/runtime/zero/stage3.py).
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return lambda p: _locate_in_zero_3(p, optimizer)
    # FP16_UnfusedOptimizer (runtime/fp16/unfused_optimizer.py), fp16 and bf16 without ZeRO.
    if hasattr(optimizer, "fp16_groups"):
        fp32_copies = dict(_half_and_fp32(optimizer))
        return lambda p: _Location(fp32_copies[p], 0, 0, p.numel(), replicated=True)
    if optimizer is adam:
        return lambda p: _Location(p, 0, 0, p.numel(), replicated=True)
    # DeepSpeedZeroOptimizer (runtime/zero/stage_1_and_2.py) or BF16_Optimizer.
    return lambda p: _locate_in_slice(p, adam)


def _locate_in_zero_3(parameter: nn.Parameter, optimizer: Any) -> _Location:
    # grad_position: by parameter id, [group, offset in the group's flat tensor, elements of this
    # rank's partition including padding]. _get_param_partition_rank: the rank that owns the
    # partition. ds_numel: elements of the whole parameter. fp32_partitioned_groups_flat: one flat
    # fp32 tensor a group, which Adam updates. If one changes, compare with
    # DeepSpeedZeroOptimizer_Stage3.get_full_hp_param and its callers.
    group, offset, padded_length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = padded_length * optimizer._get_param_partition_rank(parameter)
    length = max(0, min(padded_length, parameter.ds_numel - start))
    return _Location(optimizer.fp32_partitioned_groups_flat[group], offset, start, length)


def _locate_in_slice(parameter: nn.Parameter, adam: torch.optim.Optimizer) -> _Location | None:
    # _hp_mapping (deepspeed/utils/tensor_fragment.py): links a low-precision parameter with the
    # range of it in this rank's high-precision slice; None where no element falls into the slice.
    # lp_fragment_address: the range in the flattened parameter; hp_fragment_address: the range in
    # the slice; param_group_index: the Adam group, which holds that slice as its only parameter.
    # If one changes, compare with get_full_hp_param there.
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    [held] = adam.param_groups[mapping.param_group_index]["params"]
    elements = mapping.lp_fragment_address
    return _Location(held, mapping.hp_fragment_address.start, elements.start, elements.numel)


def _half_and_fp32(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    # fp16_groups, fp32_groups: two lists of lists in the same order, the model's parameters (bf16
    # ones, too) and their fp32 copies. If they change, see FP16_UnfusedOptimizer.__init__.
    return zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)


def update_compute_weights(optimizer: Any) -> None:
    """Copy the fp32 weights, which were written to, into those that compute. Collective; blocks."""
    if hasattr(optimizer, "update_lp_params"):
        # ZeRO 1 and 2 and BF16_Optimizer: copies fp32 slices to the parameters and all-gathers.
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # ZeRO 3. The prologue partitions parameters that are still gathered. Reassigning copies a
        # group's fp32 slice to its low-precision one. The epilogue gathers the persistent
        # parameters again. If one changes, see _rigid_load_state_dict there.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "fp16_groups"):
        for half, fp32 in _half_and_fp32(optimizer):
            half.copy_(fp32)


def loss_scale(optimizer: Any) -> dict[str, float]:
    """Return the state of the dynamic loss scaler of fp16; empty for other dtypes.

    The scale doubles after a number of steps without overflow and halves with each that has one
    (Micikevicius et al. 2018, Mixed Precision Training, section 3.2). A run that resumed without
    this state would skip steps that it did not skip before.
    """
    scaler = _scaler_attributes(optimizer)
    return {name: value for name, value in scaler.items() if name in _LOSS_SCALE_STATE}


def set_loss_scale(optimizer: Any, state: dict[str, float]) -> None:
    """Restore what ``loss_scale`` returned; without effect for other dtypes."""
    _scaler_attributes(optimizer).update(state)


def _scaler_attributes(optimizer: Any) -> dict[str, Any]:
    """Return the attribute dict of the optimizer's loss scaler; empty unless it is dynamic.

    ZeRO's optimizers have a ``loss_scaler`` (``dynamic``), the half-precision optimizers a
    ``loss_scale_config`` (``dynamic_loss_scale``), both in runtime/fp16/loss_scaler.py.
    """
    scaler = getattr(optimizer, "loss_scaler", None)
    if not scaler:
        scaler = getattr(optimizer, "loss_scale_config", None)
    is_dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return vars(scaler) if is_dynamic else {}
