"""Whether a store's index, tokens, manifest and tokenizer agree: everything is read, where opening reads the index."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from megatron_ring.data.manifest import Manifest
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError

_NAMED = 3


def verify(store: TokenStore, manifest: Manifest | None, tokenizer: Tokenizer) -> None:
    """Raises DataError naming everything that does not fit; what opening the store checks is taken as checked."""
    problems = [*_miscounted(store, manifest), *_bad_documents(store, manifest, tokenizer)]
    if problems:
        raise DataError([f"token store {store.prefix}: {problem}" for problem in problems])


def _miscounted(store: TokenStore, manifest: Manifest | None) -> Iterator[str]:
    if manifest is None:
        return
    for word, told, found in (
        ("documents", manifest.documents, len(store)),
        ("tokens", manifest.tokens, int(store.lengths.sum())),
    ):
        if told != found:
            yield f"{found} {word}, and its manifest tells of {told}. Write it again with tools/prepare_data.py."


def _bad_documents(
    store: TokenStore, manifest: Manifest | None, tokenizer: Tokenizer
) -> Iterator[str]:
    """The first few documents with ids that the tokenizer has not, or that do not end as ours do."""
    ours = manifest is not None and manifest.end_of_document is not None
    begin = manifest.begin_of_document if manifest else ()
    documents = map(store.document, range(len(store)))
    faults = (
        _foreign(tokens, tokenizer)
        or (_unended(tokens, tokenizer) if ours else "")
        or _unbegun(tokens, begin)
        for tokens in documents
    )
    for number, fault in islice(
        ((number, fault) for number, fault in enumerate(faults) if fault), _NAMED
    ):
        yield f"document {number} {fault}. Set --tokenizer-model, or write it again with tools/prepare_data.py."


def _foreign(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size):
        return f"has ids from {tokens.min()} to {tokens.max()}, and the tokenizer has 0 to {tokenizer.vocab_size - 1}"
    return ""


def _unbegun(tokens: np.ndarray, begin: tuple[int, ...]) -> str:
    found = tokens[: len(begin)].tolist()
    return (
        f"begins with ids {found}, and its manifest has {list(begin)}"
        if found != list(begin)
        else ""
    )


def _unended(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Megatron's stores may end documents in any way; those of prepare.py have one end, the last."""
    ends = np.flatnonzero(tokens == tokenizer.end_of_document)
    if ends.tolist() != [tokens.size - 1]:
        return f"has {ends.size} end-of-document ids ({tokenizer.end_of_document}), and one, at its end, is right"
    return ""
