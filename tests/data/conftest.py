"""Fixtures: a small tokenizer, and small token stores written in one call."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from tests.data.text import TEXT


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 320)


@pytest.fixture(scope="session")
def store_of(tmp_path_factory) -> Callable[[Sequence[Sequence[int]]], TokenStore]:
    """A function that writes documents to a new store and opens it."""

    def write(documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> TokenStore:
        prefix = tmp_path_factory.mktemp("store") / "P"
        with TokenStoreWriter(prefix, np.dtype(dtype)) as writer:
            for document in documents:
                writer.add_document(document)
        return TokenStore(prefix)

    return write
