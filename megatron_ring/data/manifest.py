"""The manifest ``P.json`` of a prepared store: its counts and the tokenizer it was written with.

Megatron's two files do not name their tokenizer. A store without ``P.json`` can be read too; then a
wrong tokenizer is noticed only by ids outside its vocabulary (stream.py).
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_ring.data.token_index import prepare_command
from megatron_ring.data.tokenizer import FILE_NAMES, Tokenizer, beside
from megatron_ring.errors import DataError
from megatron_ring.untrusted import (
    LARGEST_INTEGER,
    UntrustedInputError,
    parse_json,
    read_bytes,
    replace_file,
)

_Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
_AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]


@dataclass(frozen=True)
class Manifest:
    """The counts of a store, end-of-document ids included, and the tokenizer that wrote it.

    - ``skipped``: documents that could not be read and were left out.
    - ``left_out``: counts, by reason, of input that is not a document to be read: files of other
      kinds, empty documents.
    - ``begin_of_document``: the ids before the text of every document (BOS).

    Manifests written before a field existed lack it, and such stores have no BOS.
    """

    tokenizer_sha256: str
    vocab_size: _Count
    documents: _Count
    tokens: _AtLeastOne
    bytes: _Count
    skipped: _Count = 0
    end_of_document: _Count | None = None
    begin_of_document: tuple[_Count, ...] = ()
    left_out: dict[str, _Count] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.bytes / self.tokens


def manifest_path(prefix: str | Path) -> Path:
    """Return the path of ``P.json``; it is written last, so a store that has one is complete."""
    return Path(f"{prefix}.json")


def tokenizer_path(prefix: str | Path) -> Path:
    """Return the path of the tokenizer in the store's folder, used where none is named.

    It is ``tokenizer.json`` if that exists, else ``tokenizer.model``. Raises DataError when
    ``prefix`` is a folder.
    """
    paths = [beside(prefix, name, "--data-path or --output-prefix") for name in FILE_NAMES]
    return next((path for path in paths if path.exists()), paths[-1])


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write ``P.json``."""
    replace_file(manifest_path(prefix), (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read ``P.json``; None if the store has none. Raises DataError when it is damaged."""
    path = manifest_path(prefix)
    try:
        return parse_json(read_bytes(path), Manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Set --data-path."
        ) from error
    except UntrustedInputError as error:
        keys = ", ".join(field.name for field in fields(Manifest))
        raise DataError(
            f"{path} is not one JSON object of {keys}: {error}. Delete it to read the store "
            f"without it, or write the store again with {prepare_command(prefix)}."
        ) from error


def check_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Raise DataError when ``P.json`` names another tokenizer or another end-of-document id."""
    manifest = read_manifest(prefix)
    if not manifest:
        return
    if manifest.tokenizer_sha256 != tokenizer.fingerprint:
        raise DataError(
            f"token store {prefix} was written with a tokenizer of {manifest.vocab_size} ids "
            f"(sha256 {manifest.tokenizer_sha256[:12]}), and the given tokenizer has "
            f"{tokenizer.vocab_size} (sha256 {tokenizer.fingerprint[:12]}). Set --tokenizer-model "
            f"to the first, or write the store again with {prepare_command(prefix)}."
        )
    if manifest.end_of_document not in (None, tokenizer.end_of_document):
        raise DataError(
            f"token store {prefix} ends documents with id {manifest.end_of_document}, and the "
            f"given tokenizer with {tokenizer.end_of_document}. Set --tokenizer-model to "
            f"{tokenizer_path(prefix)}, whose tokenizer_config.json names the end-of-document "
            f"token, or write the store again with {prepare_command(prefix)}."
        )
