"""The folder of checkpoints: written under a hidden name, renamed when whole, so that none is ever half there.

    SAVE/latest                     the name of the newest whole checkpoint
    SAVE/step-00000200/config.yaml  the resolved config that wrote it
    SAVE/step-00000200/state.json   step, samples consumed, ranks, and the size of every file
    SAVE/step-00000200/...          the engine's own files, one or two a rank

What the engine's files hold is the engine's business; nothing here talks to other processes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_ring.config import Config, ModelConfig, load_yaml, to_yaml
from megatron_ring.errors import CheckpointError

_STATE, _CONFIG, _LATEST = "state.json", "config.yaml", "latest"


@dataclass(frozen=True)
class RunState:
    """What a run needs besides weights and optimizer, in global units.

    step: optimizer steps done. consumed_samples: samples read, over all ranks. data_context_size, tensor_size,
    pipe_size and zero_stage: how the engine's files are split. vocab_size, seq_length: sizes of the model that the
    config alone does not give.
    """

    step: int
    consumed_samples: int
    data_context_size: int
    tensor_size: int
    pipe_size: int
    zero_stage: int
    vocab_size: int
    seq_length: int


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint: its folder, what it says, and the names of newer ones that were passed over, with reasons."""

    path: Path
    state: RunState
    skipped: tuple[str, ...]


def partial_name(step: int) -> str:
    """The hidden name that a checkpoint has while it is written."""
    return f".partial-{step:08d}"


def final_path(folder: Path, step: int) -> Path:
    """The folder that the checkpoint of ``step`` has once it is whole."""
    return folder / f"step-{step:08d}"


def prepare(folder: Path, step: int) -> None:
    """Make ``folder`` and clear the way for a checkpoint; raises CheckpointError when it cannot be written to."""
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / partial_name(step), ignore_errors=True)
        (folder / partial_name(step)).mkdir()


def commit(folder: Path, state: RunState, config: Config) -> Path:
    """Make what was written under the partial name the newest checkpoint; returns its folder."""
    partial, final = folder / partial_name(state.step), final_path(folder, state.step)
    with _write_errors(folder):
        (partial / _CONFIG).write_text(to_yaml(config))
        sizes = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
        (partial / _STATE).write_text(json.dumps(asdict(state) | {"files": sizes}, indent=2) + "\n")
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = folder / f".{_LATEST}"
        pointer.write_text(final.name + "\n")
        pointer.replace(folder / _LATEST)
    return final


def discard(folder: Path, step: int) -> None:
    """Take back what a failed save has left."""
    shutil.rmtree(folder / partial_name(step), ignore_errors=True)


def newest(folder: Path) -> Stored | None:
    """The newest whole checkpoint in ``folder``; None where there is no checkpoint at all.

    Raises CheckpointError where there are checkpoints and none is whole.
    """
    skipped: list[str] = []
    for path in _candidates(folder):
        try:
            return Stored(path, _checked_state(path), tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError([f"{folder} holds no whole checkpoint. Set --load to another folder.", *skipped])
    return None


def _candidates(folder: Path) -> list[Path]:
    """What to try, newest first. Steps beyond ``latest`` are of an earlier run that wrote to the same folder."""
    pointer = folder / _LATEST
    latest = pointer.read_text().strip() if pointer.is_file() else "step-~"
    return sorted((path for path in folder.glob("step-*") if path.name <= latest), reverse=True)


def check_same_model(stored: Stored, config: Config, vocab_size: int) -> None:
    """Raise CheckpointError, naming every size that differs, when the checkpoint is of another model."""
    then, now = load_yaml(stored.path / _CONFIG).model, config.model
    differing = [
        f"{f.name} {getattr(then, f.name)} there, {getattr(now, f.name)} here. Set --{f.name.replace('_', '-')}."
        for f in fields(ModelConfig)
        if getattr(then, f.name) != getattr(now, f.name)
    ]
    if stored.state.vocab_size != vocab_size:
        differing.append(f"vocab_size {stored.state.vocab_size} there, {vocab_size} here. Set --tokenizer-model.")
    if now.position_embedding_type == "learned_absolute" and stored.state.seq_length != config.data.seq_length:
        differing.append(
            f"seq_length {stored.state.seq_length} there, {config.data.seq_length} here. Set --seq-length."
        )
    if differing:
        raise CheckpointError([f"{stored.path} is a checkpoint of another model:", *differing])


def check_same_split(stored: Stored, data_context_size: int, tensor_size: int, pipe_size: int, zero_stage: int) -> None:
    """Raise CheckpointError when the engine's files are split over another number of ranks or another ZeRO stage."""
    state = stored.state
    for axis, then, now in (("tensor", state.tensor_size, tensor_size), ("pipeline", state.pipe_size, pipe_size)):
        if then != now:
            raise CheckpointError(
                f"{stored.path} splits the model over {then} {axis} ranks, this run has {now}. "
                f"Set --{axis}-model-parallel-size {then}."
            )
    if state.zero_stage != zero_stage:
        raise CheckpointError(
            f"{stored.path} was written with zero_stage {state.zero_stage}, this run has {zero_stage}. "
            f"Set --zero-stage {state.zero_stage}."
        )
    if zero_stage and state.data_context_size != data_context_size:
        raise CheckpointError(
            f"{stored.path} splits the optimizer's state over {state.data_context_size} data x context ranks (ZeRO "
            f"{zero_stage}), this run has {data_context_size}. Start {state.data_context_size} times as many processes "
            "as one model takes (tensor x pipeline); how many are context ranks (--context-parallel-size) may change."
        )


def _checked_state(path: Path) -> RunState:
    try:
        document = json.loads((path / _STATE).read_text())
        sizes = document.pop("files")
        state = RunState(**document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is passed over: its {_STATE} is missing or damaged.") from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path} is passed over: {name} {what}, {size} were written.")
    return state


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the rename says so."""
    for file in _files(folder):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error.strerror}. Set --save.") from error
