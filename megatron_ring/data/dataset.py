"""What a run reads: the tokenizer and the sample streams for training and validation, found and checked together."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ring.config import DataConfig
from megatron_ring.data.manifest import check_tokenizer, tokenizer_path
from megatron_ring.data.packing import Packing
from megatron_ring.data.prepare import prepare_python_library
from megatron_ring.data.samples import SampleStream, split_documents
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError

DEFAULT_FOLDER = Path("data")
"""Where the default corpus is prepared, under the working directory."""

# Documents of a store whose ends are looked for: a writer ends all or none, and each costs a read of the disk.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Dataset:
    """Streams of samples, and what borders between documents mean; ``validation`` is None where the split has none."""

    tokenizer: Tokenizer
    packing: Packing
    training: SampleStream
    validation: SampleStream | None

    @staticmethod
    def open(config: DataConfig, seed: int, progress: bool = False) -> "Dataset":
        """Open the store that ``config`` names, or Python's own library, which is prepared first if need be.

        Raises DataError for a store or tokenizer that is missing, damaged, too small, or does not fit the other, and
        for documents without ends where ``config`` wants them told apart.
        """
        prefix = Path(config.data_path[0]) if config.data_path else prepare_python_library(DEFAULT_FOLDER, 2, progress)
        store = TokenStore(prefix)
        tokenizer = Tokenizer.load(config.tokenizer_model or tokenizer_path(prefix))
        check_tokenizer(prefix, tokenizer)
        packing = Packing.of(config, tokenizer.end_of_document)
        _refuse_missing_ends(store, packing)
        parts = split_documents(store.lengths, config.split, config.seq_length)
        streams = [
            SampleStream(store, part, config.seq_length, seed, tokenizer.vocab_size) if part else None for part in parts
        ]
        return Dataset(tokenizer, packing, *streams)


def _refuse_missing_ends(store: TokenStore, packing: Packing) -> None:
    """Borders are read from end-of-document tokens: a store written without them would have none, in silence."""
    if not packing.flags:
        return
    written = np.flatnonzero(store.lengths)
    looked_at = written[np.linspace(0, len(written) - 1, min(_LOOKED_AT, len(written))).astype(np.int64)]
    unended = [n for n in looked_at if store.document(n)[-1] != packing.end_of_document]
    if unended:
        raise DataError(
            f"token store {store.prefix}: {len(unended)} of {len(looked_at)} documents looked at, the first of them "
            f"number {unended[0]}, do not end with the end-of-document token (id {packing.end_of_document}), from "
            f"which {', '.join(packing.flags)} read where documents end. Write the store again with "
            f"tools/prepare_data.py --output-prefix {store.prefix} (Megatron: --append-eod), set --tokenizer-model to "
            "the one it was written with, or leave out "
            f"{', '.join('--' + name.replace('_', '-') for name in packing.flags)}."
        )


def bits_per_byte(loss_sum: float, text_bytes: int) -> float:
    """Summed loss in nats as bits per byte of text: comparable between tokenizers."""
    return loss_sum / math.log(2) / max(1, text_bytes)
