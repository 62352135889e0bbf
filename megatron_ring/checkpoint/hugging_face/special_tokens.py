"""The ids of the tokens that begin and end a text, for an exported config and generation config."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_ring.checkpoint.hugging_face.folder import CONFIG, read_json
from megatron_ring.checkpoint.hugging_face.key_mappings import Fields
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, read_bytes, shown

GENERATION = "generation_config.json"
_BEGIN = "bos_token_id"
_END = "eos_token_id"
_PAD = "pad_token_id"
KEYS = (_BEGIN, _END, _PAD)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens.

    ids: by ``KEYS``, None if unknown. source: where eos_token_id was found, "" if it was not.
    """

    ids: Fields
    source: str

    @staticmethod
    def find(folder: Path | None, end_of_document: int | None) -> "SpecialTokens":
        """Find each id in the first source that has it.

        The sources are config.json, generation_config.json and the tokenizer in ``folder``, and
        then ``end_of_document``, with which the model was trained, for the end. Raises
        CheckpointError for a value that is not an id.
        """
        ids: Fields = dict.fromkeys(KEYS)
        end_source = ""
        for source, values in _sources(folder, end_of_document):
            for key in KEYS:
                value = values.get(key)
                if ids[key] is None and value not in (None, []):
                    ids[key] = _checked(key, value, source)
                    if key == _END:
                        end_source = source
            if ids[_BEGIN] is not None and ids[_END] is not None:
                break
        return SpecialTokens(ids, end_source)

    def check_rows(self, vocab_size: int) -> None:
        """Raise CheckpointError if the beginning or the end is not in the model's vocabulary."""
        for key in (_BEGIN, _END):
            ids = self.ids[key] if isinstance(self.ids[key], list) else [self.ids[key]]
            for token_id in ids:
                if token_id is not None and token_id >= vocab_size:
                    raise CheckpointError(
                        f"the tokenizer's {key} {token_id} is beyond the model's {vocab_size} "
                        "rows: the tokenizer is of another model. Set --tokenizer."
                    )

    def write_generation_config(self, folder: Path) -> bool:
        """Add the end to generation_config.json in ``folder``; returns whether it was written.

        If that file exists, transformers takes the end only from it.
        """
        path = folder / GENERATION
        existing = read_json(path) if path.is_file() else {}
        if self.ids[_END] is None or existing.get(_END) is not None:
            return False
        known = {key: value for key, value in self.ids.items() if value is not None}
        document = known | existing | {_END: self.ids[_END]}
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        return True


def _sources(folder: Path | None, end_of_document: int | None) -> Iterator[tuple[str, Fields]]:
    """Yield the name of each source and its ids by ``KEYS``; a source is read only on demand."""
    if folder:
        for name in (CONFIG, GENERATION):
            if (folder / name).is_file():
                yield name, read_json(folder / name)
        yield "the tokenizer", _ids_of_tokenizer(folder)
    yield "the run's tokenizer", {_END: end_of_document}


def _checked(key: str, value: Any, source: str) -> Any:
    ids = value if key == _END and isinstance(value, list) and value else [value]
    # The first Llamas have a padding id of -1 for none.
    lowest = -1 if key == _PAD else 0
    if not all(type(token_id) is int and lowest <= token_id < 2**31 for token_id in ids):
        raise CheckpointError(
            f"{key} is {shown(value)} in {source}, and must be the id of a token."
        )
    return value


def _ids_of_tokenizer(folder: Path) -> Fields:
    """Return the ids of the tokens in tokenizer_config.json or special_tokens_map.json.

    For tokens that these do not name, returns those of a sentencepiece model itself.
    """
    id_of, ids = _vocabulary(folder)
    named: Fields = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            entries = read_json(folder / name)
            named = {key: value for key, value in entries.items() if value is not None} | named
    for key in (_BEGIN, _END):
        token_id = id_of(_text(named.get(key.removesuffix("_id"))))
        if token_id is not None:
            ids[key] = token_id
    return ids


def _text(token: Any) -> Any:
    """Return the text of a token, which is the token itself or the content of an object."""
    return token.get("content") if isinstance(token, dict) else token


def _vocabulary(folder: Path) -> tuple[Callable[[Any], int | None], Fields]:
    """Return a function from token text to id, and the ids that a sentencepiece model declares."""
    if (folder / "tokenizer.json").is_file():
        return _ids_of_added_tokens(read_json(folder / "tokenizer.json")).get, {}
    if (path := folder / "tokenizer.model").is_file():
        return _sentencepiece(path)
    return lambda token: None, {}


def _ids_of_added_tokens(document: Fields) -> dict[Any, int]:
    """Return the ids of the added tokens, which include all special tokens."""
    added = document.get("added_tokens")
    if not isinstance(added, list):
        return {}
    return {
        token.get("content"): token.get("id")
        for token in added
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _sentencepiece(path: Path) -> tuple[Callable[[Any], int | None], Fields]:
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path) or b"\0")
        pieces.id_to_piece(list(range(pieces.vocab_size())))  # fails if one is not UTF-8
    except (OSError, RuntimeError, UnicodeDecodeError, UntrustedInputError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a sentencepiece model: {error}. Set --tokenizer."
        ) from error

    def id_of(token: Any) -> int | None:
        if not isinstance(token, str):
            return None
        token_id = pieces.piece_to_id(token)
        # Unknown pieces have the id of another piece.
        return token_id if pieces.id_to_piece(token_id) == token else None

    declared = {_BEGIN: pieces.bos_id(), _END: pieces.eos_id()}
    return id_of, {key: token_id for key, token_id in declared.items() if token_id >= 0}
