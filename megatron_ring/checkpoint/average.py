"""The mean of several checkpoints of one model, written as a checkpoint of weights only.

The mean of a run's last checkpoints is often better than any of them (Izmailov et al. 2018,
"Averaging Weights Leads to Wider Optima and Better Generalization"). Sums are in float64, one
parameter at a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import lease, names, store, tensors
from megatron_ring.checkpoint.compare import compare_names
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.summary import Summary, differing_options
from megatron_ring.errors import CheckpointError


def average(folder: Path, checkpoints: list[Summary], weights: list[float]) -> Path:
    """Write the weighted mean to ``folder``, which must not hold checkpoints; returns its path.

    The dtypes are those of the first checkpoint. Config, step and sample count, from which a run
    resumes, are those of the newest. Raises CheckpointError if the checkpoints are of different
    models or the mean cannot be written; nothing is left in ``folder`` then.
    """
    _check_free(folder)
    _check_one_model(checkpoints)
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.state.step)
    shapes = checkpoints[0].tensors.shapes
    state = _state(newest.state, checkpoints, weights)
    store.prepare(folder, state.step)
    try:
        means = ((name, _mean(name, checkpoints, weights)) for name in sorted(shapes))
        tensors.write_whole(folder / names.partial_name(state.step), shapes, means)
        records = store.flush_and_checksum(folder, state.step, store.written(folder, state.step))
        return store.commit(folder, state, newest.config, records)
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
    """Return the newest state without its optimizer part, and with the origin of the mean."""
    terms = ", ".join(
        f"{weight:g} x {checkpoint.path}"
        for checkpoint, weight in zip(checkpoints, weights, strict=True)
    )
    return replace(
        newest,
        optimizer_steps=0,
        loss_scale={},
        processes=f"1, for the mean of {terms}",
        commit=commit(),
        written_at=now(),
    )


def _check_free(folder: Path) -> None:
    if existing := names.checkpoints(folder):
        raise CheckpointError(
            f"{folder} already holds checkpoints, such as {existing[0].name}. Set OUT to another "
            "folder."
        )
    lease.check_not_held(folder)


def _check_one_model(checkpoints: list[Summary]) -> None:
    first, *others = checkpoints
    problems = [
        f"{other.path}: {difference}."
        for other in others
        for difference in _differences(first, other)
    ]
    if problems:
        raise CheckpointError([f"{first.path} is a checkpoint of another model than:", *problems])


def _differences(first: Summary, other: Summary) -> Iterator[str]:
    """Yield how two models differ in options, vocabulary size and parameters."""
    for key, (expected, found) in differing_options(first.config, other.config).items():
        if key.startswith("model."):
            yield f"{key} is {found!r}, not {expected!r}"
    if first.state.vocab_size != other.state.vocab_size:
        yield f"vocab_size is {other.state.vocab_size}, not {first.state.vocab_size}"
    compared = compare_names(first.tensors.shapes, other.tensors.shapes)
    yield from (f"{name} is missing" for name in compared.only_first)
    yield from (f"{name} is unexpected" for name in compared.only_second)
    for name in compared.reshaped:
        yield f"{name} has shape {other.tensors.shapes[name]}, not {first.tensors.shapes[name]}"
