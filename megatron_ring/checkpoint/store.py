"""The folder of checkpoints. A checkpoint is written under a hidden name and renamed once complete.

    SAVE/latest                     the name of the newest complete checkpoint
    SAVE/step-00000200/config.yaml  the resolved config of the run that wrote it
    SAVE/step-00000200/state.json   step, consumed samples; size and checksum of every other file,
                                    and its own checksum
    SAVE/step-00000200/...          the tensors (tensors.py), one file for each process

A checkpoint, or any file in it, may be a link to another disk to which it was moved: the checksums
in state.json apply wherever a file is, so no other content is mistaken for it. Nothing is written
through a link.

The process may be killed or the power may fail between any two lines here: ``newest`` then finds
the previous newest checkpoint or the new one. The content of the tensors is not examined. Nothing
here communicates with other processes.
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

STATE = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint. skipped: newer checkpoints that are not usable, with reasons."""

    path: Path
    state: RunState
    skipped: tuple[str, ...]

    def for_new_run(self) -> "Stored":
        """Return it as the start of a new run, which uses its weights only.

        Such a run begins at the first step, with the first sample and a new optimizer.
        """
        state = replace(
            self.state,
            step=0,
            consumed_samples=0,
            optimizer_steps=0,
            loss_scale={},
            skipped_steps=0,
            roll_backs=0,
            recent_losses=[],
        )
        return replace(self, state=state)


def prepare(folder: Path, step: int) -> None:
    """Create the hidden folder for the checkpoint of ``step``, after deleting leftovers.

    Raises CheckpointError if ``folder`` is not writable.
    """
    with disk.write_errors(folder):
        disk.make_folder(folder)
        retention.clear_leftovers(folder)
        (folder / names.partial_name(step)).mkdir()


def written(folder: Path, step: int) -> list[str]:
    """Return the files of the checkpoint that is being written, the largest first."""
    partial = folder / names.partial_name(step)
    with disk.write_errors(folder):
        sizes = {name: (partial / name).stat().st_size for name in _files(partial)}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def flush_and_checksum(folder: Path, step: int, files: list[str]) -> dict[str, FileRecord]:
    """Flush ``files`` of the checkpoint that is being written; returns their sizes and checksums.

    The files are read back for that.
    """
    partial = folder / names.partial_name(step)
    with disk.write_errors(folder):
        for name in files:
            disk.flush(partial / name)
        return {name: FileRecord.of(partial / name) for name in files}


def commit(
    folder: Path,
    state: RunState,
    config: Config,
    records: dict[str, FileRecord],
    delete_outdated: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Make the checkpoint that is being written the newest one; returns its folder.

    ``records`` has the records of all its files. Then, unless ``delete_outdated`` is false, deletes
    the checkpoints that --keep-last and --keep-every do not keep. ``note`` is called with a line
    for each of them whose folder had foreign files, which are kept.
    """
    partial = folder / names.partial_name(state.step)
    final = names.final_path(folder, state.step)
    with disk.write_errors(folder):
        disk.write(partial / CONFIG, to_yaml(config).encode())
        disk.write(
            partial / STATE,
            encode(state, records | flush_and_checksum(folder, state.step, [CONFIG])),
        )
        disk.flush_names(partial)
        if final.exists():
            retention.hide(final)
        disk.rename(partial, final)
        pointer = folder / f".{names.LATEST}"
        disk.write(pointer, f"{final.name}\n".encode())
        disk.rename(pointer, folder / names.LATEST)
        if delete_outdated:
            retention.remove_outdated(folder, state.step, config.checkpoint, note)
    return final


def discard(folder: Path, step: int) -> None:
    """Delete the remainder of a failed save."""
    disk.delete(folder / names.partial_name(step))


def newest(folder: Path) -> Stored | None:
    """Return the newest complete checkpoint in ``folder``; None if there is no checkpoint at all.

    Every byte of it is verified. Raises CheckpointError if there are checkpoints but none is
    complete.
    """
    return first_complete(folder, *names.candidates(folder), verify)


def first_complete(
    folder: Path, candidates: list[Path], skipped: list[str], verify: Callable[[Path], RunState]
) -> Stored | None:
    """Return the first of ``candidates`` that ``verify`` accepts, as ``newest`` does.

    ``skipped``: problems that are already known; problems of the candidates are appended.
    """
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
    """Read every file of the checkpoint at ``path`` and return its state.

    Raises CheckpointError naming the first file that differs from what was written.
    """
    state, files = described(path)
    check(path, files)
    return state


def described(path: Path) -> tuple[RunState, dict[str, FileRecord]]:
    """Return the state of the checkpoint at ``path`` and the records of its files.

    Reads no other file than its state, and raises CheckpointError if that is missing or damaged.
    Files in its folder that the state does not list are not part of it and are ignored.
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
    """Return the files in a checkpoint's folder that are not part of it.

    ``files`` are those that its state lists.
    """
    with _read_errors():
        return sorted(set(_files(path)) - {*files, STATE})


def read_config(path: Path) -> Config:
    """Return the config of the checkpoint at ``path``. Raises CheckpointError."""
    try:
        return load_yaml(path / CONFIG, remedy="Use another checkpoint.")
    except ConfigError as error:
        raise CheckpointError(
            [f"{path} has a {CONFIG} that is not valid:", *error.problems]
        ) from error


def check(path: Path, files: dict[str, FileRecord]) -> None:
    """Read ``files`` of the checkpoint at ``path``.

    Raises CheckpointError naming the first file that differs from what was written.
    """
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
