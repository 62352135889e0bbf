"""Selects the newest complete checkpoint and verifies it, on all ranks together.

Which files make up a checkpoint is in store.py. Verifying reads every file; the ranks share the
files. What exists on disk is decided by what rank 0 sees.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ring.checkpoint import names, store
from megatron_ring.checkpoint.state import RunState
from megatron_ring.errors import CheckpointError, MegatronRingError
from megatron_ring.parallel.consensus import Consensus

_Result = TypeVar("_Result")
_MAX_NAMES_SHOWN = 5


def newest_checkpoint(folder: str, consensus: Consensus) -> store.Stored | None:
    """Return the newest complete checkpoint of ``folder``, None if there is none. Collective."""
    candidates, skipped = consensus.run_on_rank_zero(lambda: names.candidates(Path(folder)))
    try:
        return store.first_complete(
            Path(folder), candidates, skipped, lambda path: _verify(path, consensus)
        )
    except _NotReadError as error:
        raise CheckpointError(error.problems) from error


def named_checkpoint(checkpoint: str, consensus: Consensus) -> store.Stored:
    """Return the checkpoint that --load itself names; raise CheckpointError if it is damaged."""
    path = Path(checkpoint)
    try:
        return store.Stored(path, _verify(path, consensus), ())
    except _NotReadError as error:
        raise CheckpointError(error.problems) from error
    except CheckpointError as error:
        folder = path.absolute().parent
        all_names = consensus.run_on_rank_zero(
            lambda: [checkpoint.name for checkpoint in names.checkpoints(folder)]
        )
        others = [name for name in all_names if name != path.absolute().name]
        advice = ""
        if others:
            advice = f"The same folder has {', '.join(others[:_MAX_NAMES_SHOWN])}. "
        raise CheckpointError(
            f"{path} is not complete: {error}. {advice}Set --load to another."
        ) from error


def _verify(path: Path, consensus: Consensus) -> RunState:
    """Verify every file of a checkpoint; the ranks share them, the largest first. Blocks.

    Raises CheckpointError where the checkpoint is damaged, and _NotReadError where that could not
    be determined.
    """
    failed = f"{path} cannot be read"
    state, files = consensus.run_on_rank_zero(
        with_checkpoint_error(failed, lambda: store.described(path), _NotReadError)
    )
    ordered = sorted(files, key=lambda name: (-files[name].bytes, name))
    own = {name: files[name] for name in ordered[consensus.rank :: consensus.ranks]}
    consensus.gather(with_checkpoint_error(failed, lambda: store.check(path, own), _NotReadError))
    return state


class _NotReadError(MegatronRingError):
    """A checkpoint could not be read for a reason outside of it, such as memory."""

    exit_code = CheckpointError.exit_code


def with_checkpoint_error(
    failed: str,
    act: Callable[[], _Result],
    kind: type[MegatronRingError] = CheckpointError,
) -> Callable[[], _Result]:
    """Return ``act`` with every error turned into one of ``kind``, which all ranks can agree on.

    The message begins with ``failed`` and has the type and the message of the error, which is its
    cause. Errors other than of memory or disk are bugs, so this rank prints their traceback.
    """

    def checked() -> _Result:
        try:
            return act()
        except (MegatronRingError, KeyboardInterrupt):
            raise
        except BaseException as error:
            if not isinstance(error, OSError | MemoryError):
                traceback.print_exc()
            raise kind(f"{failed}: {type(error).__name__}: {error}") from error

    return checked
