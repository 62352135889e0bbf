"""Which processes read which tokens: the first pipeline stage only, each rank its own tokens."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.document_boundaries import NO_BOUNDARIES, DocumentBoundaries
from megatron_ring.data.loader import LaterStageLoader, Loader, build_loader
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.data.samples import SampleStream
from megatron_ring.data.tokens import TokenStore
from megatron_ring.parallel.grid import Grid

S = 16
GLOBAL_BATCH = 8
STEPS = 3
GRID = Grid(pipe=2, ring=2)


class RecordingArray(np.ndarray):
    """Tokens of a store that record the bytes read from them, and from views of them, in a list."""

    bytes_read: ClassVar[list[int]] = []

    def __getitem__(self, key):
        result = super().__getitem__(key)
        if isinstance(key, np.ndarray):
            RecordingArray.bytes_read.append(result.nbytes)
        return result

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        RecordingArray.bytes_read.append(self.nbytes)
        return getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **keywords)


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """The bytes of every read from a store."""
    document = TokenStore.document
    monkeypatch.setattr(
        TokenStore, "document", lambda store, i: document(store, i).view(RecordingArray)
    )
    monkeypatch.setattr(RecordingArray, "bytes_read", [])
    return RecordingArray.bytes_read


@pytest.fixture
def stream(store_of) -> SampleStream:
    """A stream of tokens of 2 bytes."""
    store = store_of([range(1000 * i, 1000 * i + 50) for i in range(10)])
    return SampleStream(store, range(10), S, seed=5, vocab_size=65536)


def loader_of_rank(
    stream: SampleStream,
    boundaries: DocumentBoundaries,
    grid: Grid,
    rank: int,
    consumed_samples: int = 0,
) -> Loader | LaterStageLoader:
    return build_loader(
        stream,
        boundaries,
        Layout("striped", S, grid.ring),
        grid,
        grid.coordinates(rank),
        micro_batch_size=2,
        global_batch_size=GLOBAL_BATCH,
        consumed_samples=consumed_samples,
    )


def bytes_per_rank(
    stream: SampleStream, boundaries: DocumentBoundaries, grid: Grid, bytes_read: list[int]
) -> list[int]:
    """The bytes that each rank reads in STEPS optimizer steps."""
    totals = []
    for rank in range(grid.world_size):
        bytes_read.clear()
        loader = loader_of_rank(stream, boundaries, grid, rank)
        for _ in range(STEPS):
            loader.next_step()
        totals.append(sum(bytes_read))
    return totals


def test_a_context_rank_reads_its_own_tokens_and_a_later_stage_none(stream, bytes_read):
    local_tokens = STEPS * GLOBAL_BATCH * S // 2 * 2
    tokens_and_targets = 2 * local_tokens
    expected = [tokens_and_targets, tokens_and_targets, 0, 0]
    assert bytes_per_rank(stream, NO_BOUNDARIES, GRID, bytes_read) == expected


def test_with_document_boundaries_the_first_stage_reads_whole_samples_and_a_later_one_none(
    stream, bytes_read
):
    whole_samples = STEPS * GLOBAL_BATCH * S * 2
    boundaries = DocumentBoundaries(end_of_document=0, reset_attention_mask=True)
    expected = [2 * whole_samples, 2 * whole_samples, 0, 0]
    assert bytes_per_rank(stream, boundaries, GRID, bytes_read) == expected


def test_every_tensor_rank_reads_the_same_tokens(stream, bytes_read):
    local_tokens = STEPS * GLOBAL_BATCH * S // 2 * 2
    grid = replace(GRID, tensor=2)
    expected = [2 * local_tokens] * 4 + [0] * 4
    assert bytes_per_rank(stream, NO_BOUNDARIES, grid, bytes_read) == expected


def test_a_later_stage_counts_the_samples_that_the_first_consumes(stream):
    for rank in range(GRID.world_size):
        loader = loader_of_rank(stream, NO_BOUNDARIES, GRID, rank, consumed_samples=24)
        with Prefetcher(loader) as ahead:
            batches = [ahead.next_step() for _ in range(STEPS)]
            assert ahead.consumed_samples == 24 + STEPS * GLOBAL_BATCH
        micro_batches = 0 if GRID.coordinates(rank).pipe else GLOBAL_BATCH // 2
        assert [len(step) for step in batches] == [micro_batches] * STEPS
