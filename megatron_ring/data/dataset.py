"""What a run reads: the tokenizer and the streams of training, validation and test samples, checked together."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ring.config import DataConfig
from megatron_ring.data.manifest import check_tokenizer, read_manifest, tokenizer_path
from megatron_ring.data.map_cache import OpenMaps
from megatron_ring.data.mixture import Blend
from megatron_ring.data.packing import Packing
from megatron_ring.data.prepare import prepare_python_library
from megatron_ring.data.samples import PARTS, SampleStream, document_ranges, split_documents
from megatron_ring.data.stream import Stream
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import ConfigError, DataError, flag

DEFAULT_FOLDER = Path("data")
"""Where the default corpus is prepared, under the working directory."""

# Documents of a store whose ends are looked for: a writer ends all or none, and each costs a read of the disk.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Dataset:
    """Streams of samples, None where the split has no such part, and what borders between documents mean.

    prefixes: of the token stores that they are read from.
    """

    tokenizer: Tokenizer
    packing: Packing
    training: Stream
    validation: Stream | None
    test: Stream | None = None
    prefixes: tuple[str, ...] = ()

    @staticmethod
    def open(config: DataConfig, seed: int, progress: bool = False) -> "Dataset":
        """Open the stores that ``config`` names, or Python's own library, which is prepared first if need be.

        Raises DataError for a store or tokenizer that is missing, damaged, too small, or does not fit the others, and
        for documents without ends where ``config`` wants them told apart.
        """
        weights = config.blend or {
            str(prepare_python_library(DEFAULT_FOLDER, 2, progress)): Fraction(1)
        }
        maps = OpenMaps()
        stores = [TokenStore(prefix, maps) for prefix in weights]
        _refuse_different_tokenizers(list(weights))
        tokenizer = Tokenizer.load(config.tokenizer_model or tokenizer_path(stores[0].prefix))
        packing = Packing.of(config, tokenizer.end_of_document)
        for store in stores:
            check_tokenizer(store.prefix, tokenizer)
            _refuse_missing_ends(store, packing)
        of_stores = [_parts(store, config, seed, tokenizer.vocab_size) for store in stores]
        streams = [_blend(parts, weights.values()) for parts in zip(*of_stores)]
        return Dataset(tokenizer, packing, *streams, prefixes=tuple(weights))


def _parts(
    store: TokenStore, config: DataConfig, seed: int, vocab_size: int
) -> list[SampleStream | WholeDocumentStream | None]:
    """The samples of one store for each share of the split, None for a share of 0."""
    kind = (
        SampleStream
        if config.packing == "concatenate"
        else partial(WholeDocumentStream, fit=config.packing)
    )
    try:
        _refuse_empty_parts(config, len(store.lengths))
        parts = split_documents(store.lengths, config.shares, config.seq_length)
    except (ConfigError, DataError) as error:
        raise type(error)(
            f"token store {store.prefix}: {problem}" for problem in error.problems
        ) from error
    return [
        kind(store, part, config.seq_length, seed, vocab_size) if part else None for part in parts
    ]


def _refuse_empty_parts(config: DataConfig, documents: int) -> None:
    """Refuse shares of another sum than 1 that leave a part without a document: they may be meant as counts.

    Raises ConfigError. Of shares that add up to 1 it is the data that is too small, which split_documents finds.
    """
    if config.split_adds_up_to_1:
        return
    names = [
        name
        for name, share, part in zip(
            PARTS, config.shares, document_ranges(documents, config.shares)
        )
        if share > 0 and not part
    ]
    if names:
        given = ", ".join(f"{share:g}" for share in config.split)
        raise ConfigError(
            f"split {given} adds up to {sum(config.split):g} and gives {' and '.join(names)} none of {documents} "
            f"documents, of which one is a share of {1 / documents:.3g}. Set --split to shares that give each part a "
            "document, or 0 to a part that is not wanted."
        )


def _blend(streams: Sequence[Stream | None], weights: Iterable[Fraction]) -> Stream | None:
    """The streams taken in turns, or the only one; a share of 0 is 0 of every store."""
    return Blend(streams, list(weights)) if len(streams) > 1 and streams[0] else streams[0]


def _refuse_different_tokenizers(prefixes: list[str]) -> None:
    """Ids of a blend are of one tokenizer. A store without a manifest does not say which it has."""
    known = [(prefix, manifest) for prefix in prefixes if (manifest := read_manifest(prefix))]
    for prefix, manifest in known[1:]:
        first, other = known[0][1].tokenizer_sha256[:12], manifest.tokenizer_sha256[:12]
        begins = known[0][1].begin_of_document, manifest.begin_of_document
        if first == other and begins[0] != begins[1]:
            raise DataError(
                f"token stores {known[0][0]} and {prefix} cannot be blended: documents begin with ids "
                f"{list(begins[0])} in the first and {list(begins[1])} in the other. Write one again with "
                f"tools/prepare_data.py --output-prefix {prefix} and --prepend-bos on or off, or leave one out of "
                "--data-path."
            )
        if first != other:
            raise DataError(
                f"token stores {known[0][0]} and {prefix} cannot be blended: they were written with two tokenizers "
                f"(sha256 {first} and {other}). Write one again with the other's, tools/prepare_data.py "
                f"--output-prefix {prefix} --tokenizer-model {tokenizer_path(known[0][0])}, or leave one out of "
                "--data-path."
            )


def _refuse_missing_ends(store: TokenStore, packing: Packing) -> None:
    """Borders are read from end-of-document tokens: a store written without them would have none, in silence."""
    if not packing.flags:
        return
    written = np.flatnonzero(store.lengths)
    looked_at = written[
        np.linspace(0, len(written) - 1, min(_LOOKED_AT, len(written))).astype(np.int64)
    ]
    unended = [n for n in looked_at if store.document(n)[-1] != packing.end_of_document]
    if unended:
        raise DataError(
            f"token store {store.prefix}: {len(unended)} of {len(looked_at)} documents looked at, the first of them "
            f"number {unended[0]}, do not end with the end-of-document token (id {packing.end_of_document}), from "
            f"which {', '.join(packing.flags)} read where documents end. Write the store again with "
            f"tools/prepare_data.py --output-prefix {store.prefix} (Megatron: --append-eod), set --tokenizer-model to "
            "the one it was written with, or leave out "
            f"{', '.join(map(flag, packing.flags))}."
        )


def bits_per_byte(loss_sum: float, text_bytes: int) -> float:
    """Summed loss in nats as bits per byte of text: comparable between tokenizers."""
    return loss_sum / math.log(2) / max(1, text_bytes)
