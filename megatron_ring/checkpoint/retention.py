"""Which checkpoints are kept, and how the others go: none before a newer one is whole and ``latest`` names it.

A checkpoint that goes gets a hidden name first, so that one killed half deleted is never looked at.
"""

from pathlib import Path

from megatron_ring.checkpoint import disk, names
from megatron_ring.config import CheckpointConfig


def outdated(steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Of ``steps``, newest first, those that neither rule keeps. The newest is always kept.

    >>> outdated([60, 50, 40, 30, 20, 10], keep_last=2, keep_every=20)
    [30, 10]
    """
    if keep_last == 0:
        return []
    return [step for step in steps[keep_last:] if keep_every == 0 or step % keep_every]


def remove_outdated(folder: Path, newest: int, config: CheckpointConfig) -> None:
    """Delete what --keep-last and --keep-every let go, now that the checkpoint of step ``newest`` is whole.

    Steps beyond it are of an earlier run that wrote to the same folder: they neither count nor go.
    """
    steps = [step for path in names.checkpoints(folder) if (step := names.step_of(path)) <= newest]
    for step in outdated(steps, config.keep_last, config.keep_every):
        put_aside(names.final_path(folder, step))
    for path in names.hidden(folder, names.REMOVED):
        disk.delete(path)


def put_aside(path: Path) -> None:
    """Give a checkpoint the hidden name of those that go; after a power cut too, what is half deleted has that name."""
    disk.delete(names.removed_path(path))
    disk.rename(path, names.removed_path(path))


def clear_leftovers(folder: Path) -> None:
    """Delete what killed saves have left, but not the last checkpoint there is."""
    for path in names.hidden(folder, names.PARTIAL):
        disk.delete(path)
    visible = [path for path in names.checkpoints(folder) if not path.name.startswith(names.REMOVED)]
    for path in names.hidden(folder, names.REMOVED) if visible else []:
        disk.delete(path)
