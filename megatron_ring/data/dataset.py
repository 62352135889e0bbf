"""Open the data of a run: the tokenizer and the sample streams of training, validation and test.

The token stores that ``--data-path`` names are opened, their documents are split into the parts of
``--split``, and each part becomes a ``Stream`` of numbered samples (stream.py): samples.py or
whole_documents.py for one store, blend.py for a blend of several. Everything that can disagree is
checked here, before training starts: stores, manifests, tokenizer, split and document boundaries.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_ring.config import DataConfig
from megatron_ring.data.blend import Blend
from megatron_ring.data.document_boundaries import DocumentBoundaries
from megatron_ring.data.manifest import check_tokenizer, read_manifest, tokenizer_path
from megatron_ring.data.map_cache import MapCache
from megatron_ring.data.prepare import prepare_python_library
from megatron_ring.data.samples import PARTS, SampleStream, document_ranges, split_documents
from megatron_ring.data.stream import Stream
from megatron_ring.data.token_index import prepare_command
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import ConfigError, DataError, counted, flag

DEFAULT_FOLDER = Path("data")
"""The folder, relative to the working directory, in which the default corpus is prepared."""

# Documents checked for an end-of-document token. A writer ends all documents or none, and each
# document checked costs a disk read.
_DOCUMENTS_CHECKED = 1000


@dataclass(frozen=True)
class Dataset:
    """The tokenizer, the sample streams of a run, and how boundaries between documents are handled.

    A stream is None where its share of the split is 0, or where it is not needed, which training
    always does. ``prefixes`` are those of the token stores.
    """

    tokenizer: Tokenizer
    boundaries: DocumentBoundaries
    training: Stream
    validation: Stream | None
    test: Stream | None = None
    prefixes: tuple[str, ...] = ()

    @staticmethod
    def open(
        config: DataConfig, seed: int, progress: bool = False, needed: Collection[str] = PARTS
    ) -> "Dataset":
        """Open the stores that ``config`` names, or the default corpus, for the ``needed`` parts.

        The default corpus is the source text of Python's own library; it is prepared first if it
        does not exist yet. Raises DataError for a store or tokenizer that is missing, damaged, too
        small or does not fit the others, and for documents without end-of-document tokens where
        ``config`` needs document boundaries. Raises ConfigError for a split that does not add up to
        1 and leaves a part without documents.
        """
        weights = config.blend or {
            str(prepare_python_library(DEFAULT_FOLDER, 2, progress)): Fraction(1)
        }
        maps = MapCache()
        stores = [TokenStore(prefix, maps) for prefix in weights]
        _refuse_different_tokenizers(list(weights))
        tokenizer = Tokenizer.load(config.tokenizer_model or tokenizer_path(stores[0].prefix))
        boundaries = DocumentBoundaries.from_config(config, tokenizer.end_of_document)
        for store in stores:
            check_tokenizer(store.prefix, tokenizer)
            _refuse_missing_ends(store, boundaries)
        parts_by_store = [
            _split(store, config, seed, tokenizer.vocab_size, needed) for store in stores
        ]
        streams = [_blend(streams, weights.values()) for streams in zip(*parts_by_store)]
        return Dataset(tokenizer, boundaries, *streams, prefixes=tuple(weights))


def _split(
    store: TokenStore, config: DataConfig, seed: int, vocab_size: int, needed: Collection[str]
) -> list[Stream | None]:
    """Return one stream per part of the split of one store, None for a share of 0."""
    try:
        _refuse_empty_parts(config, len(store.lengths))
        parts = split_documents(store.lengths, config.shares, config.seq_length, needed)
    except (ConfigError, DataError) as error:
        problems = [f"token store {store.prefix}: {problem}" for problem in error.problems]
        raise type(error)(problems) from error
    return [_stream(store, part, config, seed, vocab_size) if part else None for part in parts]


def _stream(
    store: TokenStore, documents: range, config: DataConfig, seed: int, vocab_size: int
) -> Stream:
    if config.packing == "concatenate":
        return SampleStream(store, documents, config.seq_length, seed, vocab_size)
    return WholeDocumentStream(
        store, documents, config.seq_length, seed, vocab_size, fit=config.packing
    )


def _refuse_empty_parts(config: DataConfig, documents: int) -> None:
    """Raise ConfigError where a split that does not add up to 1 leaves a part without documents.

    Such shares may have been meant as document counts, so the option is reported. Where the shares
    do add up to 1 the data is too small, which ``split_documents`` reports as a DataError.
    """
    if config.split_adds_up_to_1:
        return
    ranges = document_ranges(documents, config.shares)
    empty = [
        name
        for name, share, part in zip(PARTS, config.shares, ranges)
        if share > 0 and len(part) == 0
    ]
    if empty:
        split = ", ".join(f"{share:g}" for share in config.split)
        raise ConfigError(
            f"split {split} adds up to {sum(config.split):g} and gives {' and '.join(empty)} none "
            f"of {counted(documents, 'document')}; one document is a share of "
            f"{1 / documents:.3g}. Set --split to shares that give each part a document, or to 0 "
            "for a part that is not wanted."
        )


def _blend(streams: Sequence[Stream | None], weights: Iterable[Fraction]) -> Stream | None:
    """Blend the same part of several stores; a share of 0 is None in every store."""
    if len(streams) == 1 or streams[0] is None:
        return streams[0]
    return Blend(streams, list(weights))


def _refuse_different_tokenizers(prefixes: list[str]) -> None:
    """Raise DataError where the manifests of a blend's stores differ in tokenizer or BOS ids.

    A store without a manifest does not record its tokenizer and is not compared.
    """
    known = [(prefix, manifest) for prefix in prefixes if (manifest := read_manifest(prefix))]
    for prefix, manifest in known[1:]:
        first_prefix, first = known[0]
        other = tokenizer_path(first_prefix)
        if first.tokenizer_sha256[:12] != manifest.tokenizer_sha256[:12]:
            raise DataError(
                f"token stores {first_prefix} and {prefix} cannot be blended: they were written "
                f"with different tokenizers (sha256 {first.tokenizer_sha256[:12]} and "
                f"{manifest.tokenizer_sha256[:12]}). Write one again with the tokenizer of the "
                f"other, {prepare_command(prefix, f'--tokenizer-model {other}')}, or remove one "
                "from --data-path."
            )
        if first.begin_of_document != manifest.begin_of_document:
            raise DataError(
                f"token stores {first_prefix} and {prefix} cannot be blended: documents begin with "
                f"ids {list(first.begin_of_document)} in the first and "
                f"{list(manifest.begin_of_document)} in the second. Write one again with "
                f"{prepare_command(prefix, '--prepend-bos on')} (or off), or remove one from "
                "--data-path."
            )


def _refuse_missing_ends(store: TokenStore, boundaries: DocumentBoundaries) -> None:
    """Raise DataError where boundaries are needed and documents have no end-of-document token.

    Boundaries are found by these tokens, so without the check such a store would silently be
    trained as one document.
    """
    if not boundaries.flags:
        return
    nonempty = np.flatnonzero(store.lengths)
    picks = np.linspace(0, len(nonempty) - 1, min(_DOCUMENTS_CHECKED, len(nonempty)))
    checked = nonempty[picks.astype(np.int64)]
    unended = [n for n in checked if store.document(n)[-1] != boundaries.end_of_document]
    if unended:
        raise DataError(
            f"token store {store.prefix}: {len(unended)} of {len(checked)} documents checked do "
            f"not end with the end-of-document token (id {boundaries.end_of_document}); the first "
            f"is document {unended[0]}. {', '.join(boundaries.flags)} find document boundaries by "
            f"this token. Write the store again with {prepare_command(store.prefix)} (Megatron: "
            "--append-eod), set --tokenizer-model to the tokenizer it was written with, or "
            f"remove {', '.join(map(flag, boundaries.flags))}."
        )


def bits_per_byte(loss_sum: float, text_bytes: int) -> float:
    """Convert a summed loss in nats to bits per byte of text, comparable between tokenizers."""
    return loss_sum / math.log(2) / max(1, text_bytes)
