"""What a checkpoint says of itself, in state.json: where the run was, every file's size and checksum, its own checksum.

SHA-256 is the fastest of the standard library's strong checksums where the processor has instructions for it: 1.4 GB/s
of file on one core of an AMD Zen 5, BLAKE2b 0.84 GB/s.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_ring.errors import CheckpointError

_NOT_OURS = "its state.json is damaged or of another version"
_LAST_LINE = b',\n  "sha256": "%s"\n}\n'


@dataclass(frozen=True)
class RunState:
    """What a run needs besides its tensors, in global units, and where they come from.

    step: optimizer steps done. consumed_samples: samples read, over all ranks. vocab_size, seq_length: sizes of the
    model that the config alone does not give. optimizer_steps: those that Adam's moments have seen; 0 without moments.
    loss_scale: of fp16, what its scaler counts. skipped_steps, roll_backs: how often either followed a bad step;
    recent_losses: of the last good steps, oldest first, as far as a spike is measured by them. end_of_document: the id
    that ends documents in the data trained on, None in an import and in older checkpoints. processes, commit,
    written_at (UTC): who wrote it and when; told, but no resuming run depends on them.
    """

    step: int
    consumed_samples: int
    vocab_size: int
    seq_length: int
    optimizer_steps: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    roll_backs: int = 0
    recent_losses: list[float] = field(default_factory=list)
    end_of_document: int | None = None
    processes: str = ""
    commit: str = ""
    written_at: str = ""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written. bytes: its size."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "FileRecord":
        """Read a file back, all of it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileRecord(file.tell(), digest)

    def fault(self, path: Path) -> str | None:
        """What is no longer as it was written in the file at ``path``, or None."""
        if not path.is_file():
            return f"is missing, {self.bytes} bytes were written"
        size = path.stat().st_size
        if size != self.bytes:
            return f"has {size} bytes, {self.bytes} were written"
        return None if FileRecord.of(path) == self else f"has other bytes than the {self.bytes} that were written"


def encode(state: RunState, files: dict[str, FileRecord]) -> bytes:
    """state.json, whose last line is the SHA-256 of all bytes before that line."""
    document = asdict(state) | {"files": {name: asdict(record) for name, record in sorted(files.items())}}
    body = json.dumps(document, indent=2).removesuffix("\n}").encode()
    return body + _LAST_LINE % _sha256(body)


def decode(content: bytes) -> tuple[RunState, dict[str, FileRecord]]:
    """What ``encode`` was given. Raises CheckpointError when a byte of it is another, before anything is parsed."""
    body = content[: -len(_LAST_LINE % _sha256(b""))]
    if content != body + _LAST_LINE % _sha256(body):
        raise CheckpointError(_NOT_OURS)
    try:
        document = json.loads(content)
        del document["sha256"]
        files = {name: FileRecord(**record) for name, record in document.pop("files").items()}
        return RunState(**document), files
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(_NOT_OURS) from error


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
