"""Who reads what: of a grid's processes those on the first pipeline stage, each its own tokens."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.packing import NO_BORDERS, Packing
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.data.samples import SampleStream
from megatron_ring.data.stages import loader_of
from megatron_ring.data.tokens import TokenStore
from megatron_ring.parallel.grid import Grid

S = 16
GLOBAL_BATCH = 8
STEPS = 3
GRID = Grid(pipe=2, ring=2)


class Watched(np.ndarray):
    """Tokens of a store that note how many bytes are taken out of them, and out of views of them, in one list."""

    taken: ClassVar[list[int]] = []

    def __getitem__(self, places):
        found = super().__getitem__(places)
        if isinstance(places, np.ndarray):
            Watched.taken.append(found.nbytes)
        return found

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        Watched.taken.append(self.nbytes)
        return getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **keywords)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The bytes of every look into a store."""
    document = TokenStore.document
    monkeypatch.setattr(TokenStore, "document", lambda store, i: document(store, i).view(Watched))
    monkeypatch.setattr(Watched, "taken", [])
    return Watched.taken


@pytest.fixture
def stream(store_of) -> SampleStream:
    """Tokens of 2 bytes."""
    return SampleStream(
        store_of([range(1000 * i, 1000 * i + 50) for i in range(10)]), range(10), S, 5, 65536
    )


def bytes_of_ranks(
    stream: SampleStream, packing: Packing, grid: Grid, taken: list[int]
) -> list[int]:
    """What every rank reads in STEPS optimizer steps."""
    layout, found = Layout("striped", S, grid.ring), []
    for rank in range(grid.world_size):
        taken.clear()
        loader = loader_of(
            stream,
            packing,
            layout,
            grid,
            grid.coordinates(rank),
            2,
            GLOBAL_BATCH,
            consumed_samples=0,
        )
        for _ in range(STEPS):
            loader.next_step()
        found.append(sum(taken))
    return found


def test_a_context_rank_reads_its_own_tokens_and_a_later_stage_none(stream, taken):
    own = STEPS * GLOBAL_BATCH * S // 2 * 2
    tokens_and_targets = 2 * own
    assert bytes_of_ranks(stream, NO_BORDERS, GRID, taken) == [
        tokens_and_targets,
        tokens_and_targets,
        0,
        0,
    ]


def test_where_documents_are_kept_apart_the_first_stage_looks_at_whole_samples_and_a_later_one_still_at_none(
    stream, taken
):
    whole = STEPS * GLOBAL_BATCH * S * 2
    packing = Packing(end_of_document=0, reset_attention_mask=True)
    assert bytes_of_ranks(stream, packing, GRID, taken) == [2 * whole, 2 * whole, 0, 0]


def test_tensor_ranks_read_the_same_tokens_each(stream, taken):
    own = STEPS * GLOBAL_BATCH * S // 2 * 2
    assert (
        bytes_of_ranks(stream, NO_BORDERS, replace(GRID, tensor=2), taken)
        == [2 * own] * 4 + [0] * 4
    )


def test_a_later_stage_counts_the_samples_that_the_first_consumes(stream):
    for rank in range(GRID.world_size):
        at = GRID.coordinates(rank)
        with Prefetcher(
            loader_of(
                stream,
                NO_BORDERS,
                Layout("striped", S, 2),
                GRID,
                at,
                2,
                GLOBAL_BATCH,
                consumed_samples=24,
            )
        ) as ahead:
            batches = [ahead.next_step() for _ in range(STEPS)]
            assert ahead.consumed_samples == 24 + STEPS * GLOBAL_BATCH
        assert [len(step) for step in batches] == [0 if at.pipe else GLOBAL_BATCH // 2] * STEPS
