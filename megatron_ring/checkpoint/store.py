"""The folder of checkpoints: written under a hidden name, renamed when whole, so that none is ever half there.

    SAVE/latest                     the name of the newest whole checkpoint
    SAVE/step-00000200/config.yaml  the resolved config that wrote it
    SAVE/step-00000200/state.json   step, samples consumed; size and checksum of every file, itself included
    SAVE/step-00000200/...          the tensors (tensors.py), one file a process

A checkpoint, or any file in it, may be a link to another disk, to which it was moved: the checksums of state.json hold
wherever a file lies, so that nothing else is taken for it. Nothing is written through a link.

A process may be killed and the power may fail between any two lines here: ``newest`` then finds the checkpoint that
was the newest before, or the new one. What is in the tensors is not looked at; nothing here talks to other
processes.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ring.checkpoint import disk, names, retention
from megatron_ring.checkpoint.state import FileRecord, RunState, decode, encode
from megatron_ring.config import Config, load_yaml, to_yaml
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.untrusted import UntrustedInputError, read_bytes

STATE, CONFIG = "state.json", "config.yaml"


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint: its folder, what it says, and the names of newer ones that were passed over, with reasons."""

    path: Path
    state: RunState
    skipped: tuple[str, ...]

    def for_new_run(self) -> "Stored":
        """Its weights alone: a run from them begins at the first step, with the first sample and a new optimizer."""
        begun = {"step": 0, "consumed_samples": 0, "optimizer_steps": 0, "loss_scale": {}}
        unguarded = {"skipped_steps": 0, "roll_backs": 0, "recent_losses": []}
        return replace(self, state=replace(self.state, **begun, **unguarded))


def prepare(folder: Path, step: int) -> None:
    """Make ``folder`` and clear the way for a checkpoint; raises CheckpointError when it cannot be written to."""
    with disk.write_errors(folder):
        disk.make_folder(folder)
        retention.clear_leftovers(folder)
        (folder / names.partial_name(step)).mkdir()


def written(folder: Path, step: int) -> list[str]:
    """The files of the checkpoint that is being written, the largest first."""
    partial = folder / names.partial_name(step)
    with disk.write_errors(folder):
        sizes = {name: (partial / name).stat().st_size for name in _files(partial)}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def seal(folder: Path, step: int, files: list[str]) -> dict[str, FileRecord]:
    """Flush ``files`` of the checkpoint that is being written, and read them back for their sizes and checksums."""
    partial = folder / names.partial_name(step)
    with disk.write_errors(folder):
        for name in files:
            disk.flush(partial / name)
        return {name: FileRecord.of(partial / name) for name in files}


def commit(
    folder: Path,
    state: RunState,
    config: Config,
    sealed: dict[str, FileRecord],
    retire: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Make what was written under the partial name, all of it ``sealed``, the newest checkpoint;
    returns its folder.

    Then removes those that --keep-last and --keep-every let go, unless ``retire`` is false.
    ``note`` is given a line for each of them that had files of other origin in it, which are kept.
    """
    partial, final = folder / names.partial_name(state.step), names.final_path(folder, state.step)
    with disk.write_errors(folder):
        disk.write(partial / CONFIG, to_yaml(config).encode())
        disk.write(partial / STATE, encode(state, sealed | seal(folder, state.step, [CONFIG])))
        disk.flush_names(partial)
        if final.exists():
            retention.put_aside(final)
        disk.rename(partial, final)
        pointer = folder / f".{names.LATEST}"
        disk.write(pointer, f"{final.name}\n".encode())
        disk.rename(pointer, folder / names.LATEST)
        if retire:
            retention.remove_outdated(folder, state.step, config.checkpoint, note)
    return final


def discard(folder: Path, step: int) -> None:
    """Take back what a failed save has left."""
    disk.delete(folder / names.partial_name(step))


def newest(folder: Path) -> Stored | None:
    """The newest whole checkpoint in ``folder``, every byte of it checked; None where there is no checkpoint at all.

    Raises CheckpointError where there are checkpoints and none is whole.
    """
    return first_whole(folder, *names.candidates(folder), verify)


def first_whole(
    folder: Path, candidates: list[Path], skipped: list[str], verify: Callable[[Path], RunState]
) -> Stored | None:
    """The first of ``candidates`` that ``verify`` passes; ``skipped``: what is known to be wrong before. See newest."""
    for path in candidates:
        try:
            return Stored(path, verify(path), tuple(skipped))
        except CheckpointError as fault:
            skipped.append(f"{path} is passed over: {fault}.")
    if skipped:
        raise CheckpointError(
            [f"{folder} holds no whole checkpoint. Set --load to another folder.", *skipped]
        )
    return None


def verify(path: Path) -> RunState:
    """What the checkpoint at ``path`` says, after each of its files was read and found as it was written.

    Raises CheckpointError that names the first file that is not.
    """
    state, files = described(path)
    check(path, files)
    return state


def described(path: Path) -> tuple[RunState, dict[str, FileRecord]]:
    """The state of the checkpoint at ``path`` and the records of its files, which are not read.

    Raises CheckpointError where its state is missing or damaged.
    Files in its folder that it does not name are no part of it, and are not looked at.
    """
    with _read_errors():
        if not (path / STATE).is_file():
            raise CheckpointError(f"its {STATE} is missing")
        state, files = decode(read_bytes(path / STATE))
        if names.is_checkpoint(path) and names.step_of(path) != state.step:
            raise CheckpointError(
                f"its {STATE} is of step {state.step}, and its name of step {names.step_of(path)}"
            )
        return state, files


def foreign_files(path: Path, files: Collection[str]) -> list[str]:
    """The files in the checkpoint's folder that are not among ``files``, those that it names."""
    with _read_errors():
        return sorted(set(_files(path)) - {*files, STATE})


def read_config(path: Path) -> Config:
    """Return the config of the checkpoint at ``path``. Raises CheckpointError."""
    try:
        return load_yaml(path / CONFIG, remedy="Give another checkpoint.")
    except ConfigError as error:
        raise CheckpointError(
            [f"{path} has a {CONFIG} that no run writes:", *error.problems]
        ) from error


def check(path: Path, files: dict[str, FileRecord]) -> None:
    """Read ``files`` of the checkpoint at ``path``; CheckpointError names the first that is not as it was written."""
    with _read_errors():
        for name, record in files.items():
            if fault := record.fault(path / name):
                raise CheckpointError(f"{name} {fault}")


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})") from error
    except UntrustedInputError as error:
        raise CheckpointError(f"it cannot be read ({error})") from error


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
