"""The mean of several checkpoints of one model, as a checkpoint of weights alone.

Of the last ones of a run it is often better than any of them (Izmailov et al. 2018, "Averaging Weights Leads to Wider
Optima and Better Generalization"). Sums are float64, one parameter at a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import lease, names, store, tensors
from megatron_ring.checkpoint.compare import sorted_out
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.summary import Summary, differing
from megatron_ring.errors import CheckpointError


def average(folder: Path, checkpoints: list[Summary], weights: list[float]) -> Path:
    """Write the mean to ``folder``, which must hold no checkpoint yet; returns the new one.

    Types are those of the first; config, step and samples those of the newest, after which a run goes on. Raises
    CheckpointError where the models are not one, or the mean cannot be written: then nothing is left.
    """
    _check_free(folder)
    _check_one_model(checkpoints)
    newest, shapes = max(checkpoints, key=lambda one: one.state.step), checkpoints[0].tensors.shapes
    state = _state(newest.state, checkpoints, weights)
    store.prepare(folder, state.step)
    try:
        means = ((name, _mean(name, checkpoints, weights)) for name in sorted(shapes))
        tensors.write_whole(folder / names.partial_name(state.step), shapes, means)
        sealed = store.seal(folder, state.step, store.written(folder, state.step))
        return store.commit(folder, state, newest.config, sealed)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"the mean cannot be written to {folder}: {error}") from error
    finally:
        store.discard(folder, state.step)


def _mean(name: str, checkpoints: list[Summary], weights: list[float]) -> torch.Tensor:
    first = checkpoints[0].tensors
    total = torch.zeros(first.shapes[name], dtype=torch.float64)
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        total.add_(checkpoint.tensors.read(name), alpha=weight)
    return total.div_(sum(weights)).to(first.dtype(name))


def _state(newest: RunState, checkpoints: list[Summary], weights: list[float]) -> RunState:
    """Of the newest, but for the optimizer's part, which no moments go with, and for how it was made."""
    shares = ", ".join(
        f"{weight:g} x {one.path}" for one, weight in zip(checkpoints, weights, strict=True)
    )
    return replace(
        newest,
        optimizer_steps=0,
        loss_scale={},
        processes=f"1, for the mean of {shares}",
        commit=commit(),
        written_at=now(),
    )


def _check_free(folder: Path) -> None:
    if found := names.checkpoints(folder):
        raise CheckpointError(
            f"{folder} holds checkpoints already, such as {found[0].name}. Give OUT another name."
        )
    lease.check_not_held(folder)


def _check_one_model(checkpoints: list[Summary]) -> None:
    first, *others = checkpoints
    problems = [f"{one.path}: {said}." for one in others for said in _differences(first, one)]
    if problems:
        raise CheckpointError([f"{first.path} is a checkpoint of another model than:", *problems])


def _differences(first: Summary, other: Summary) -> Iterator[str]:
    """What the other's model has, and what the first's: options, vocabulary, parameters."""
    for key, (expected, found) in differing(first.config, other.config).items():
        if key.startswith("model."):
            yield f"{key} is {found!r}, not {expected!r}"
    if first.state.vocab_size != other.state.vocab_size:
        yield f"vocab_size is {other.state.vocab_size}, not {first.state.vocab_size}"
    found = sorted_out(first.tensors.shapes, other.tensors.shapes)
    yield from (f"{name} is missing" for name in found.only_first)
    yield from (f"{name} is there as well" for name in found.only_second)
    for name in found.reshaped:
        yield f"{name} has shape {other.tensors.shapes[name]}, not {first.tensors.shapes[name]}"
