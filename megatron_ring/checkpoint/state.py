"""What a checkpoint says of itself, in state.json: where the run was, every file's size and checksum, its own checksum.

SHA-256 is the fastest of the standard library's strong checksums where the processor has instructions for it: 1.4 GB/s
of file on one core of an AMD Zen 5, BLAKE2b 0.84 GB/s.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, open_regular, parse_json, path_inside

_NOT_OURS = "its state.json is damaged or of another version"
_LAST_LINE = b',\n  "sha256": "%s"\n}\n'
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# Far beyond any run, and such that arithmetic with it stays within 64 bits.
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


@dataclass(frozen=True)
class RunState:
    """What a run needs besides its tensors, in global units, and where they come from.

    step: optimizer steps done. consumed_samples: samples read, over all ranks. vocab_size, seq_length: sizes of the
    model that the config alone does not give. optimizer_steps: those that Adam's moments have seen; 0 without moments.
    loss_scale: of fp16, what its scaler counts. skipped_steps, roll_backs: how often either followed a bad step;
    recent_losses: of the last good steps, oldest first, as far as a spike is measured by them. end_of_document: the id
    that ends documents in the data trained on, None in an import and in older checkpoints. processes, commit,
    written_at (UTC): who wrote it and when; told, but no resuming run depends on them. data: the fingerprint of each
    token store that the run has read (data/fingerprint.py); empty in checkpoints from before they were kept.
    """

    # Types and ranges hold for what is read from a file; see untrusted.parse_json.
    __pydantic_config__ = _STRICT

    step: _Count
    consumed_samples: _Count
    vocab_size: _Size
    seq_length: _Size
    optimizer_steps: _Count = 0
    loss_scale: dict[str, int | float] = field(default_factory=dict)
    skipped_steps: _Count = 0
    roll_backs: _Count = 0
    recent_losses: list[float] = field(default_factory=list)
    end_of_document: _Count | None = None
    processes: str = ""
    commit: str = ""
    written_at: str = ""
    data: list[dict[str, str | int]] = field(default_factory=list)


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written. bytes: its size."""

    __pydantic_config__ = _STRICT

    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @staticmethod
    def of(path: Path) -> "FileRecord":
        """Read a file back, all of it. Raises UntrustedInputError where it is not a regular file."""
        with os.fdopen(open_regular(path), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileRecord(file.tell(), digest)

    def fault(self, path: Path) -> str | None:
        """What is no longer as it was written in the file at ``path``, or None."""
        if not path.is_file():
            return f"is missing, {self.bytes} bytes were written"
        size = path.stat().st_size
        if size != self.bytes:
            return f"has {size} bytes, {self.bytes} were written"
        return (
            None
            if FileRecord.of(path) == self
            else f"has other bytes than the {self.bytes} that were written"
        )


@dataclass(frozen=True)
class _Document(RunState):
    """All of state.json."""

    files: dict[str, FileRecord] = field(kw_only=True)
    sha256: str = field(kw_only=True)


def encode(state: RunState, files: dict[str, FileRecord]) -> bytes:
    """Return state.json, whose last line is the SHA-256 of all bytes before that line.

    Raises CheckpointError for values that ``decode`` would refuse.
    """
    document = asdict(state) | {
        "files": {name: asdict(record) for name, record in sorted(files.items())}
    }
    body = json.dumps(document, indent=2).removesuffix("\n}").encode()
    content = body + _LAST_LINE % _sha256(body)
    decode(content)
    return content


def decode(content: bytes) -> tuple[RunState, dict[str, FileRecord]]:
    """Return what ``encode`` was given.

    Raises CheckpointError when a byte of it is another, before anything is parsed, and when a
    field, a type, a range or the name of a file is not one that ``encode`` writes.
    """
    body = content[: -len(_LAST_LINE % _sha256(b""))]
    if content != body + _LAST_LINE % _sha256(body):
        raise CheckpointError(_NOT_OURS)
    try:
        document = parse_json(content, _Document)
        for name in document.files:
            path_inside(Path(), name)
    except UntrustedInputError as error:
        raise CheckpointError(f"{_NOT_OURS}: {error}") from error
    return RunState(**{f.name: getattr(document, f.name) for f in fields(RunState)}), document.files


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
