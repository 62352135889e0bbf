"""Inspect a token store: verify all of its content, and draw how long its documents are.

Opening a store reads the index only; ``verify`` reads every token and checks index, tokens,
manifest and tokenizer against one another.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from megatron_ring.data.manifest import Manifest
from megatron_ring.data.token_index import prepare_command
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError, counted

# Faulty documents named in one error.
_DOCUMENTS_NAMED = 3
_BAR_WIDTH = 40


def verify(store: TokenStore, manifest: Manifest | None, tokenizer: Tokenizer) -> None:
    """Raise DataError with everything that does not fit.

    What opening the store has checked is not checked again.
    """
    problems = [*_wrong_counts(store, manifest), *_faulty_documents(store, manifest, tokenizer)]
    if problems:
        raise DataError([f"token store {store.prefix}: {problem}" for problem in problems])


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return (2^k, how many of ``lengths`` are in [2^k, 2^(k+1))) pairs, shortest first.

    The first and last bins are those of the shortest and longest length; k = 0 counts 0 too.
    """
    # frexp is exact where a logarithm may round across a power of two.
    powers = np.maximum(np.frexp(lengths.astype(np.float64))[1] - 1, 0)
    counts = np.bincount(powers)
    return [(1 << power, int(counts[power])) for power in range(int(powers.min()), len(counts))]


def draw_histogram(lengths: np.ndarray) -> str:
    """Draw the histogram of document lengths as text, one line with a bar per power of two."""
    histogram = length_histogram(lengths)
    largest = max(count for _, count in histogram)
    lines = ["tokens, from   documents"]
    for size, count in histogram:
        bar = "#" * round(_BAR_WIDTH * count / largest)
        lines.append(f"{size:>12,}  {count:>12,}  {bar}".rstrip())
    return "\n".join(lines)


def _wrong_counts(store: TokenStore, manifest: Manifest | None) -> Iterator[str]:
    if manifest is None:
        return
    counts = (
        ("documents", manifest.documents, len(store)),
        ("tokens", manifest.tokens, int(store.lengths.sum())),
    )
    for name, expected, actual in counts:
        if actual != expected:
            yield (
                f"{actual} {name}, and its manifest has {expected}. Write it again with "
                f"{prepare_command(store.prefix)}."
            )


def _faulty_documents(
    store: TokenStore, manifest: Manifest | None, tokenizer: Tokenizer
) -> Iterator[str]:
    """Name the first few documents with unknown ids, or with a wrong end or beginning."""
    ends_are_known = manifest is not None and manifest.end_of_document is not None
    begin = manifest.begin_of_document if manifest else ()

    def faults() -> Iterator[str]:
        for number in range(len(store)):
            tokens = store.document(number)
            fault = _unknown_ids(tokens, tokenizer)
            if not fault and ends_are_known:
                fault = _wrong_end(tokens, tokenizer)
            fault = fault or _wrong_begin(tokens, begin)
            if fault:
                yield (
                    f"document {number} {fault}. Set --tokenizer-model, or write it again with "
                    f"{prepare_command(store.prefix)}."
                )

    return islice(faults(), _DOCUMENTS_NAMED)


def _unknown_ids(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size):
        return (
            f"has ids from {tokens.min()} to {tokens.max()}, and the tokenizer has 0 to "
            f"{tokenizer.vocab_size - 1}"
        )
    return ""


def _wrong_begin(tokens: np.ndarray, begin: tuple[int, ...]) -> str:
    actual = tokens[: len(begin)].tolist()
    if actual != list(begin):
        return f"begins with ids {actual}, and its manifest has {list(begin)}"
    return ""


def _wrong_end(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Check that the one end-of-document id is the last, as prepare.py writes it.

    Stores that Megatron wrote may end documents in any way and are not checked.
    """
    ends = np.flatnonzero(tokens == tokenizer.end_of_document)
    if ends.tolist() != [tokens.size - 1]:
        return (
            f"has {counted(ends.size, 'end-of-document id')} ({tokenizer.end_of_document}) and "
            "must have exactly one, at its end"
        )
    return ""
