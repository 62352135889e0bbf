"""Finds the checkpoint or Hugging Face folder that ``--load`` of an inference command names."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ring.checkpoint import foreign_formats, names, store
from megatron_ring.checkpoint.hugging_face import folder as hugging_face
from megatron_ring.checkpoint.locate import locate
from megatron_ring.checkpoint.selection import (
    named_checkpoint,
    newest_checkpoint,
    with_checkpoint_error,
)
from megatron_ring.errors import CheckpointError
from megatron_ring.parallel.consensus import Consensus

_Result = TypeVar("_Result")


def find_model(load: str, consensus: Consensus | None) -> tuple[Path, tuple[str, ...]]:
    """Return the checkpoint or Hugging Face folder to read, and notes on why it is that one.

    With ``consensus`` rank 0 decides, and the ranks verify a checkpoint's files together; it is
    collective and blocks. Without, nothing is verified. Raises CheckpointError if there is none.
    """

    def on_rank_zero(act: Callable[[], _Result]) -> _Result:
        return consensus.run_on_rank_zero(act) if consensus else act()

    kind = on_rank_zero(
        with_checkpoint_error(f"load {load} cannot be read", lambda: _kind_of(Path(load)))
    )
    if kind == "Hugging Face":
        return Path(load), ()
    if consensus is None:
        located = locate(Path(load))
        return located.path, (located.note,) if located.note else ()
    select = named_checkpoint if kind == "checkpoint" else newest_checkpoint
    stored = select(load, consensus)
    if stored is None:
        raise CheckpointError(f"load {load} holds no checkpoint. Set --load.")
    return stored.path, stored.skipped


def _kind_of(load: Path) -> str:
    """Return "checkpoint", "folder of checkpoints" or "Hugging Face"; raise if it is neither."""
    if not load.exists():
        raise CheckpointError(
            f"load {load} does not exist. Set --load to a --save folder, a checkpoint or a Hugging "
            "Face folder."
        )
    if (load / store.STATE).is_file():
        return "checkpoint"
    if load.is_dir() and names.checkpoints(load):
        return "folder of checkpoints"
    if (load / hugging_face.CONFIG).is_file():
        return "Hugging Face"
    try:
        foreign_formats.check_not_foreign(load)
    except CheckpointError as error:
        first, *others = error.problems
        raise CheckpointError([f"load {first}", *others, "Set --load."]) from error
    inner = foreign_formats.within(load)
    hint = f", but {inner[0]} does. Set --load {inner[0]}." if inner else ". Set --load."
    raise CheckpointError(
        f"load {load} holds neither a checkpoint (step-NNNNNNNN) nor a Hugging Face model "
        f"({hugging_face.CONFIG}){hint}"
    )
