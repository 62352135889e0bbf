"""The loader: each rank reads its own tokens, and the grid affects nothing else."""

from dataclasses import fields
from itertools import chain, count, islice, product

import numpy as np
import pytest
import torch

from megatron_ring.context_parallel.layout import DocumentPlacement, Layout
from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.data.document_boundaries import DocumentBoundaries
from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.samples import SampleStream

S = 16
GLOBAL_BATCH = 8
END = 0
# Each flag, and the field of a batch that it changes.
FLAGS = {
    "reset_attention_mask": "document_starts",
    "reset_position_ids": "positions",
    "eod_mask_loss": "targets_Bl",
}
ALL_FLAGS = dict.fromkeys(FLAGS, True)


@pytest.fixture(scope="module")
def stream(store_of) -> SampleStream:
    """31 samples an epoch, all tokens different."""
    documents = [range(1000 * i, 1000 * i + 50) for i in range(10)]
    return SampleStream(store_of(documents), range(10), seq_length=S, seed=5, vocab_size=65536)


def only_batch(
    stream: SampleStream, layout: Layout, ring_rank: int = 0, samples: int = 1, **options
) -> Batch:
    """The single micro-batch of a step of ``samples`` samples on one data rank."""
    loader = Loader(
        stream,
        layout,
        ring_rank,
        data_rank=0,
        data_size=1,
        micro_batch_size=samples,
        global_batch_size=samples,
        **options,
    )
    (batch,) = loader.next_step()
    return batch


def token_target_position(batch: Batch) -> torch.Tensor:
    """Each token of a batch with its target and its position: (B, l, 3)."""
    return torch.stack(
        [batch.tokens_Bl, batch.targets_Bl, batch.positions.expand_as(batch.tokens_Bl)], dim=-1
    )


def steps_of(
    stream,
    layout: Layout,
    data_size: int,
    micro_batch_size: int,
    consumed: int,
    steps: int,
    ulysses: int = 1,
) -> torch.Tensor:
    """Tokens, targets and positions of all ranks, assembled: (steps x global batch, S, 3)."""
    whole = torch.full((steps * GLOBAL_BATCH, layout.seq_length, 3), -1)
    ranks = product(range(data_size), range(layout.ring_size), range(ulysses))
    for data_rank, ring_rank, ulysses_rank in ranks:
        loader = Loader(
            stream,
            layout,
            ring_rank,
            data_rank,
            data_size,
            micro_batch_size,
            GLOBAL_BATCH,
            consumed,
            ulysses_rank=ulysses_rank,
            ulysses_size=ulysses,
        )
        for step in range(steps):
            for micro, batch in enumerate(loader.next_step()):
                first = step * GLOBAL_BATCH + (micro * data_size + data_rank) * micro_batch_size
                rows = torch.arange(first, first + micro_batch_size)[:, None]
                positions_l = layout.positions(ring_rank, ulysses_rank, ulysses)
                whole[rows, positions_l] = token_target_position(batch)
    return whole


@pytest.mark.parametrize(
    ("name", "tokens", "targets"),
    [
        ("ring", [[0, 1], [2, 3], [4, 5], [6, 7]], [[1, 2], [3, 4], [5, 6], [7, 8]]),
        ("striped", [[0, 4], [1, 5], [2, 6], [3, 7]], [[1, 5], [2, 6], [3, 7], [4, 8]]),
        ("zigzag", [[0, 7], [1, 6], [2, 5], [3, 4]], [[1, 8], [2, 7], [3, 6], [4, 5]]),
    ],
)
def test_tokens_0_to_7_on_four_ring_ranks(store_of, name, tokens, targets):
    stream = SampleStream(store_of([range(9)]), range(1), seq_length=8, seed=1, vocab_size=9)
    layout = Layout(name, seq_length=8, ring_size=4)
    for ring_rank in range(4):
        batch = only_batch(stream, layout, ring_rank)
        assert batch.tokens_Bl.tolist() == [tokens[ring_rank]]
        assert batch.targets_Bl.tolist() == [targets[ring_rank]]
        assert batch.positions.tolist() == tokens[ring_rank]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("ring", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("striped", [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ("zigzag", [[0, 1], [6, 7], [2, 3], [4, 5]]),
    ],
)
def test_tokens_0_to_7_on_two_ring_ranks_of_two_ulysses_ranks(store_of, name, tokens):
    stream = SampleStream(store_of([range(9)]), range(1), seq_length=8, seed=1, vocab_size=9)
    layout = Layout(name, 8, 2)
    for (ring_rank, ulysses_rank), owned in zip(product(range(2), range(2)), tokens):
        batch = only_batch(stream, layout, ring_rank, ulysses_rank=ulysses_rank, ulysses_size=2)
        assert batch.tokens_Bl.tolist() == [owned]
        assert batch.targets_Bl.tolist() == [[token + 1 for token in owned]]
        assert batch.positions.tolist() == owned


def test_one_process_reads_whole_samples(stream):
    loader = Loader(stream, Layout("none", S, 1), 0, 0, 1, micro_batch_size=2, global_batch_size=4)
    first, second = loader.next_step()
    for batch, indices in ((first, (0, 1)), (second, (2, 3))):
        assert batch.tokens_Bl.tolist() == [stream.sample(index)[:-1].tolist() for index in indices]
        assert batch.targets_Bl.tolist() == [stream.sample(index)[1:].tolist() for index in indices]
        assert batch.positions.tolist() == list(range(S))
        assert batch.document_starts is None
    assert first.tokens_Bl.dtype == first.targets_Bl.dtype == first.positions.dtype == torch.int64


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("ulysses", [1, 2, 4])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("none", S, 1),
        Layout("ring", S, 4),
        Layout("striped", S, 2),
        Layout("striped", S, 4, stripe_size=2),
        Layout("zigzag", S, 4),
    ],
    ids=lambda layout: f"{layout.name}{layout.ring_size}",
)
def test_all_ranks_together_read_what_one_process_reads(
    stream, layout, ulysses, data_size, micro_batch_size
):
    one_process = steps_of(
        stream, Layout("none", S, 1), data_size=1, micro_batch_size=1, consumed=0, steps=5
    )
    all_ranks = steps_of(
        stream, layout, data_size, micro_batch_size, consumed=0, steps=5, ulysses=ulysses
    )
    assert torch.equal(all_ranks, one_process)


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_run_resumed_on_another_grid_continues_with_the_next_samples(stream, done):
    uninterrupted = steps_of(
        stream, Layout("striped", S, 4), data_size=1, micro_batch_size=2, consumed=0, steps=6
    )
    resumed = steps_of(
        stream,
        Layout("zigzag", S, 2),
        data_size=4,
        micro_batch_size=1,
        consumed=done * GLOBAL_BATCH,
        steps=6 - done,
    )
    assert torch.equal(resumed, uninterrupted[done * GLOBAL_BATCH :])


def test_every_rank_counts_the_whole_global_batch_as_consumed(stream):
    loader = Loader(stream, Layout("striped", S, 2), 1, 1, 2, 2, GLOBAL_BATCH, consumed_samples=24)
    loader.next_step()
    loader.next_step()
    assert loader.consumed_samples == 24 + 2 * GLOBAL_BATCH


def test_the_second_epoch_has_another_order(stream):
    loader = Loader(
        stream, Layout("none", S, 1), 0, 0, 1, 1, global_batch_size=stream.samples_per_epoch
    )
    first = [batch.tokens_Bl.tolist() for batch in loader.next_step()]
    second = [batch.tokens_Bl.tolist() for batch in loader.next_step()]
    assert first != second
    assert len(first) == len(second) == stream.samples_per_epoch


# ---- packed documents ----

PACKED_S = 24
"""A multiple of the length that each layout below needs."""

LENGTHS = {
    "one token each": [1],
    "shorter than the ring": [2, 3],
    "two ends in a row": [6, 1],
    "of prime length": [5, 7, 11, 13],
    "fills the sample": [PACKED_S],
    "cut at the edge": [PACKED_S + 6],
    "longer than two samples": [3 * PACKED_S],
}


def packed_stream(store_of, lengths: list[int]) -> SampleStream:
    """Two samples filled with documents of these lengths, repeated.

    They are one document of the store, so that shuffling does not reorder them.
    """
    numbers = count(1)
    documents = ([*islice(numbers, length - 1), END] for _ in count() for length in lengths)
    tokens = list(islice(chain.from_iterable(documents), 2 * PACKED_S + 1))
    return SampleStream(
        store_of([tokens]), range(1), seq_length=PACKED_S, seed=1, vocab_size=len(tokens) + 1
    )


def packed_batch(
    stream: SampleStream,
    layout: Layout,
    ring_rank: int = 0,
    ulysses_rank: int = 0,
    ulysses: int = 1,
    **flags: bool,
) -> Batch:
    return only_batch(
        stream,
        layout,
        ring_rank,
        samples=2,
        boundaries=DocumentBoundaries(END, **flags),
        ulysses_rank=ulysses_rank,
        ulysses_size=ulysses,
    )


def test_packed_documents_on_four_striped_ranks(store_of):
    stream = SampleStream(
        store_of([[1, 2, END, 4, END, END, 7, 8, 9]]), range(1), seq_length=8, seed=1, vocab_size=10
    )
    starts, targets, positions = [], [], []
    layout = Layout("striped", 8, 4)
    for ring_rank in range(4):
        batch = only_batch(
            stream, layout, ring_rank, boundaries=DocumentBoundaries(END, **ALL_FLAGS)
        )
        starts += [batch.document_starts.tolist()]
        targets += batch.targets_Bl.tolist()
        positions += batch.positions.tolist()
    assert starts == [[0, 3, 5, 6]] * 4
    assert targets == [[2, -100], [END, -100], [-100, 8], [END, 9]]
    assert positions == [[0, 1], [1, 0], [2, 0], [0, 1]]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_one_process_reads_boundaries_computed_from_whole_samples(store_of, lengths):
    stream = packed_stream(store_of, lengths)
    boundaries = DocumentBoundaries(END, **ALL_FLAGS)
    batch = packed_batch(stream, Layout("none", PACKED_S, 1), **ALL_FLAGS)
    samples = np.stack([stream.sample(0), stream.sample(1)])
    assert batch.tokens_Bl.tolist() == samples[:, :-1].tolist()
    assert batch.targets_Bl.tolist() == boundaries.targets(samples[:, :-1], samples[:, 1:]).tolist()
    ends = samples[:, :-1] == END
    assert batch.positions.tolist() == boundaries.positions(ends, np.arange(PACKED_S)).tolist()
    assert batch.document_starts.tolist() == boundaries.document_starts(ends).tolist()
    tensors = [getattr(batch, field.name) for field in fields(Batch)[:4]]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "layout",
    [
        Layout("ring", PACKED_S, 4),
        Layout("striped", PACKED_S, 4),
        Layout("striped", PACKED_S, 3, stripe_size=2),
        Layout("striped", PACKED_S, 2, stripe_size=3),
        Layout("striped", PACKED_S, 4, stripe_size=6),
        Layout("zigzag", PACKED_S, 4),
    ],
    ids=lambda layout: f"{layout.name}{layout.ring_size}x{layout.stripe_size}",
)
@pytest.mark.parametrize("ulysses", [1, 2])
def test_packed_documents_do_not_depend_on_the_layout(store_of, layout, ulysses, lengths):
    stream = packed_stream(store_of, lengths)
    one_process = packed_batch(stream, Layout("none", PACKED_S, 1), **ALL_FLAGS)
    all_ranks = torch.full((2, PACKED_S, 3), -1)
    for ring_rank, ulysses_rank in product(range(layout.ring_size), range(ulysses)):
        batch = packed_batch(stream, layout, ring_rank, ulysses_rank, ulysses, **ALL_FLAGS)
        positions_l = layout.positions(ring_rank, ulysses_rank, ulysses)
        all_ranks[:, positions_l] = token_target_position(batch)
        assert torch.equal(batch.document_starts, one_process.document_starts)
    assert torch.equal(all_ranks, token_target_position(one_process))


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_changes_only_its_own_field(store_of, flag):
    stream = packed_stream(store_of, LENGTHS["of prime length"])
    layout = Layout("striped", PACKED_S, 4)
    for ring_rank in range(4):
        none = packed_batch(stream, layout, ring_rank)
        one = packed_batch(stream, layout, ring_rank, **{flag: True})
        all_on = packed_batch(stream, layout, ring_rank, **ALL_FLAGS)
        for field in fields(Batch):
            expected = all_on if field.name == FLAGS[flag] else none
            torch.testing.assert_close(
                getattr(one, field.name), getattr(expected, field.name), rtol=0, atol=0
            )


def test_padding_of_a_layout_is_owned_by_the_last_ulysses_ranks(store_of):
    """Five tokens on 2 ring x 2 Ulysses ranks: positions 5 to 7 repeat the last token."""
    stream = SampleStream(
        store_of([[1, 2, 3, 4, 5, 6]]), range(1), seq_length=5, seed=1, vocab_size=10
    )
    tokens, targets = [], []
    layout = Layout("striped", 8, 2)
    for ring_rank, ulysses_rank in product(range(2), range(2)):
        batch = only_batch(stream, layout, ring_rank, ulysses_rank=ulysses_rank, ulysses_size=2)
        tokens += batch.tokens_Bl.tolist()
        targets += batch.targets_Bl.tolist()
    assert tokens == [[1, 3], [5, 5], [2, 4], [5, 5]]
    assert targets == [[2, 4], [6, -100], [3, 5], [-100, -100]]


def test_a_layout_longer_than_the_samples_is_padded_at_their_end(store_of):
    """Seven tokens on four ranks: position 7 repeats the last token and its position, no target."""
    stream = SampleStream(
        store_of([[1, 2, END, 4, 5, 6, 7, 8]]), range(1), seq_length=7, seed=1, vocab_size=10
    )
    tokens, targets, positions = [], [], []
    layout = Layout("striped", 8, 4)
    for ring_rank in range(4):
        batch = only_batch(
            stream, layout, ring_rank, boundaries=DocumentBoundaries(END, **ALL_FLAGS)
        )
        assert batch.document_starts.tolist() == [0, 3]
        tokens += batch.tokens_Bl.tolist()
        targets += batch.targets_Bl.tolist()
        positions += batch.positions.tolist()
    assert tokens == [[1, 5], [2, 6], [END, 7], [4, 7]]
    assert targets == [[2, 6], [END, 7], [-100, 8], [5, -100]]
    assert positions == [[0, 1], [1, 2], [2, 3], [0, 4]]


def test_placed_samples_have_positions_of_their_own_and_every_token_once(store_of):
    """Two samples with different documents: all ranks together read what one process reads."""
    lengths = [33, 9, 8, 8, 10, 9, 17, 5, 29] * 4
    documents = [[*range(1, n), END] for n in lengths]
    stream = SampleStream(store_of(documents), range(36), seq_length=64, seed=5, vocab_size=65536)
    boundaries = DocumentBoundaries(END, reset_attention_mask=True, reset_position_ids=True)
    layout = Layout("striped", 64, 2, placement=DocumentPlacement(block=8))
    whole = only_batch(stream, Layout("none", 64, 1), samples=2, boundaries=boundaries)
    of_ranks = [
        only_batch(
            stream, layout, rank, 2, boundaries=boundaries, ulysses_rank=half, ulysses_size=2
        )
        for rank, half in product(range(2), range(2))
    ]
    placements = place_samples(whole.document_starts, 2, layout)
    assert all(placements)
    assert not np.array_equal(placements[0].owners, placements[1].owners)
    for sample in range(2):
        read = torch.cat([token_target_position(batch)[sample] for batch in of_ranks])
        positions = [placements[sample].positions(rank) for rank in range(2)]
        assert torch.equal(
            read[torch.cat(positions).argsort()], token_target_position(whole)[sample]
        )
    for batch in of_ranks:
        assert torch.equal(batch.document_starts, whole.document_starts)
