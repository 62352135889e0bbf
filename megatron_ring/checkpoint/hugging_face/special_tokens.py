"""The ids of the tokens that begin and end a text, as an exported config.json and generation_config.json name them."""

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
_BEGIN, _END, _PAD = KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SpecialTokens:
    """ids: by ``KEYS``, null where none is known. source: where eos_token_id was found, empty where it was not."""

    ids: Fields
    source: str

    @staticmethod
    def find(folder: Path | None, end_of_document: int | None) -> "SpecialTokens":
        """Each id from the first that has it: config.json, generation_config.json and the tokenizer in ``folder``.

        Without any the end is ``end_of_document``, which the model was trained with. Raises CheckpointError for a
        value that is no id.
        """
        ids: Fields = dict.fromkeys(KEYS)
        source = ""
        for name, found in _sources(folder, end_of_document):
            for key in KEYS:
                if ids[key] is None and (value := found.get(key)) not in (None, []):
                    ids[key] = _checked(key, value, name)
                    source = name if key == _END else source
            if ids[_BEGIN] is not None and ids[_END] is not None:
                break
        return SpecialTokens(ids, source)

    def check_rows(self, vocab_size: int) -> None:
        """Raise CheckpointError for an end or a beginning that the model has no row for."""
        for key in (_BEGIN, _END):
            ids = self.ids[key] if isinstance(self.ids[key], list) else [self.ids[key]]
            if beyond := [found for found in ids if found is not None and found >= vocab_size]:
                raise CheckpointError(
                    f"the tokenizer's {key} {beyond[0]} is beyond the model's {vocab_size} rows: it is another "
                    "model's tokenizer. Set --tokenizer."
                )

    def write_generation_config(self, folder: Path) -> bool:
        """Have generation_config.json in ``folder`` name the end; True if it was made or changed.

        transformers takes the end from it alone where it is there.
        """
        path = folder / GENERATION
        there = read_json(path) if path.is_file() else None
        if self.ids[_END] is None or (there is not None and there.get(_END) is not None):
            return False
        known = {key: value for key, value in self.ids.items() if value is not None}
        path.write_text(
            json.dumps(known | (there or {}) | {_END: self.ids[_END]}, indent=2, sort_keys=True)
            + "\n"
        )
        return True


def _sources(folder: Path | None, end_of_document: int | None) -> Iterator[tuple[str, Fields]]:
    """(name, what it has of ``KEYS``), read only when it is asked for."""
    for name in (CONFIG, GENERATION) if folder else ():
        if (folder / name).is_file():
            yield name, read_json(folder / name)
    if folder:
        yield "the tokenizer", _of_tokenizer(folder)
    yield "the run's tokenizer", {_END: end_of_document}


def _checked(key: str, value: Any, source: str) -> Any:
    ids = value if key == _END and isinstance(value, list) and value else [value]
    # A padding id of -1 is what the first Llamas have for none.
    if not all(type(found) is int and (-1 if key == _PAD else 0) <= found < 2**31 for found in ids):
        raise CheckpointError(
            f"{key} is {shown(value)} in {source}, and must be the id of a token."
        )
    return value


def _of_tokenizer(folder: Path) -> Fields:
    """As tokenizer_config.json or special_tokens_map.json spell the tokens; else a sentencepiece model's own."""
    id_of, own = _vocabulary(folder)
    named: Fields = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            named = {
                key: value for key, value in read_json(folder / name).items() if value is not None
            } | named
    spelled = {key: _spelling(named.get(key.removesuffix("_id"))) for key in (_BEGIN, _END)}
    return own | {
        key: found for key, token in spelled.items() if (found := id_of(token)) is not None
    }


def _spelling(token: Any) -> Any:
    """A token is its spelling, or an object that has it as its content."""
    return token.get("content") if isinstance(token, dict) else token


def _vocabulary(folder: Path) -> tuple[Callable[[Any], int | None], Fields]:
    """The ids of spellings, and those that a sentencepiece model has for ``KEYS`` of its own."""
    if (folder / "tokenizer.json").is_file():
        return _ids_of_json(read_json(folder / "tokenizer.json")).get, {}
    if (path := folder / "tokenizer.model").is_file():
        return _sentencepiece(path)
    return lambda token: None, {}


def _ids_of_json(document: Fields) -> dict[Any, int]:
    """The added tokens, among which are all special ones."""
    added = document.get("added_tokens")
    tokens = (
        [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    )
    return {
        token.get("content"): token.get("id")
        for token in tokens
        if isinstance(token.get("content"), str)
    }


def _sentencepiece(path: Path) -> tuple[Callable[[Any], int | None], Fields]:
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path) or b"\0")
        pieces.id_to_piece(list(range(pieces.vocab_size())))  # fails where one is not UTF-8
    except (OSError, RuntimeError, UnicodeDecodeError, UntrustedInputError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a sentencepiece model: {error}. Set --tokenizer."
        ) from error

    def id_of(token: Any) -> int | None:
        found = pieces.piece_to_id(token) if isinstance(token, str) else None
        return found if found is not None and pieces.id_to_piece(found) == token else None

    own = {_BEGIN: pieces.bos_id(), _END: pieces.eos_id()}
    return id_of, {key: found for key, found in own.items() if found >= 0}
