"""What a prepared store says of itself: ``P.json`` beside ``P.bin``, and which tokenizer the store was written with.

Megatron's two files do not name their tokenizer. A store without ``P.json`` is read all the same; then only the
ids themselves can tell that a tokenizer does not fit (samples.py).
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_ring.data.replace_file import replace_file
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import DataError


@dataclass(frozen=True)
class Manifest:
    """The counts of a store, its end-of-document ids included, and the tokenizer that wrote it."""

    tokenizer_sha256: str
    vocab_size: int
    documents: int
    tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token."""
        return self.bytes / self.tokens


def manifest_path(prefix: str | Path) -> Path:
    """``P.json``; it is written last, so a store that has one is whole."""
    return Path(f"{prefix}.json")


def tokenizer_path(prefix: str | Path) -> Path:
    """``tokenizer.model`` in the store's folder, where it is looked for when none is named."""
    return Path(prefix).parent / "tokenizer.model"


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write ``P.json``."""
    replace_file(manifest_path(prefix), (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(prefix: str | Path) -> Manifest | None:
    """What ``P.json`` says, None where a store has none. Raises DataError when it is damaged."""
    path = manifest_path(prefix)
    if not path.exists():
        return None
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        keys = ", ".join(field.name for field in fields(Manifest))
        raise DataError(
            f"{path} is not one JSON object of {keys}. Delete it to read the store without it, or write the store "
            f"again with tools/prepare_data.py --output-prefix {prefix}."
        ) from error


def check_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Raises DataError when ``P.json`` names another tokenizer than this one."""
    manifest = read_manifest(prefix)
    if manifest and manifest.tokenizer_sha256 != tokenizer.fingerprint:
        raise DataError(
            f"token store {prefix} was written with a tokenizer of {manifest.vocab_size} ids (sha256 "
            f"{manifest.tokenizer_sha256[:12]}), and the one given has {tokenizer.vocab_size} (sha256 "
            f"{tokenizer.fingerprint[:12]}). Set --tokenizer-model to the first, or write the store again with "
            f"tools/prepare_data.py --output-prefix {prefix}."
        )
