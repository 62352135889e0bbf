"""What a prepared store says of itself: ``P.json`` beside ``P.bin``, and which tokenizer the store was written with.

Megatron's two files do not name their tokenizer. A store without ``P.json`` is read all the same; then only the
ids themselves can tell that a tokenizer does not fit (samples.py).
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_ring.data.replace_file import replace_file
from megatron_ring.data.tokenizer import FILE_NAMES, Tokenizer, beside
from megatron_ring.errors import DataError
from megatron_ring.untrusted import LARGEST_INTEGER, UntrustedInputError, parse_json, read_bytes

_Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
_AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]


@dataclass(frozen=True)
class Manifest:
    """The counts of a store, its end-of-document ids included, and the tokenizer that wrote it.

    ``skipped`` are the documents left out because they could not be read, ``left_out`` counts by
    reason what is no document: files of other kinds, empty documents. ``begin_of_document`` are the
    ids before the text of every document (BOS). A store written before these were kept is without
    them, and without BOS.
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
        """UTF-8 bytes of text for each token."""
        return self.bytes / self.tokens


def manifest_path(prefix: str | Path) -> Path:
    """``P.json``; it is written last, so a store that has one is whole."""
    return Path(f"{prefix}.json")


def tokenizer_path(prefix: str | Path) -> Path:
    """``tokenizer.json`` or ``tokenizer.model`` in the store's folder, where it is looked for when none is named.

    Raises DataError when ``prefix`` is a folder.
    """
    paths = [beside(prefix, name, "--data-path or --output-prefix") for name in FILE_NAMES]
    return next((path for path in paths if path.exists()), paths[-1])


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write ``P.json``."""
    replace_file(manifest_path(prefix), (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(prefix: str | Path) -> Manifest | None:
    """What ``P.json`` says, None where a store has none. Raises DataError when it is damaged."""
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
            f"{path} is not one JSON object of {keys}: {error}. Delete it to read the store without it, or write the "
            f"store again with tools/prepare_data.py --output-prefix {prefix}."
        ) from error


def check_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> None:
    """Raises DataError when ``P.json`` names another tokenizer than this one, or another end of documents."""
    manifest = read_manifest(prefix)
    if not manifest:
        return
    if manifest.tokenizer_sha256 != tokenizer.fingerprint:
        raise DataError(
            f"token store {prefix} was written with a tokenizer of {manifest.vocab_size} ids (sha256 "
            f"{manifest.tokenizer_sha256[:12]}), and the one given has {tokenizer.vocab_size} (sha256 "
            f"{tokenizer.fingerprint[:12]}). Set --tokenizer-model to the first, or write the store again with "
            f"tools/prepare_data.py --output-prefix {prefix}."
        )
    if manifest.end_of_document not in (None, tokenizer.end_of_document):
        raise DataError(
            f"token store {prefix} ends documents with id {manifest.end_of_document}, and the tokenizer given with "
            f"{tokenizer.end_of_document}. Set --tokenizer-model to {tokenizer_path(prefix)}, whose "
            "tokenizer_config.json names the end, or write the store again with "
            f"tools/prepare_data.py --output-prefix {prefix}."
        )
