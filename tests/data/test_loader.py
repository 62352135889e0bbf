"""The loader: which rank is handed which token, and that the grid changes nothing but that."""

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.loader import Loader
from megatron_ring.data.samples import SampleStream

S = 16
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def stream(store_of) -> SampleStream:
    """Some 31 samples an epoch, every token of it different."""
    documents = [range(1000 * i, 1000 * i + 50) for i in range(10)]
    return SampleStream(store_of(documents), range(10), seq_length=S, seed=5, vocab_size=65536)


def steps_of(stream, layout: Layout, data_size: int, micro_batch_size: int, consumed: int, steps: int) -> torch.Tensor:
    """Inputs and targets of every rank put back in their places: (steps x global batch, S, 2)."""
    whole = torch.full((steps * GLOBAL_BATCH, layout.seq_length, 2), -1)
    for data_rank in range(data_size):
        for ring_rank in range(layout.ring_size):
            loader = Loader(stream, layout, ring_rank, data_rank, data_size, micro_batch_size, GLOBAL_BATCH, consumed)
            for step in range(steps):
                for micro, batch in enumerate(loader.next_step()):
                    first = step * GLOBAL_BATCH + (micro * data_size + data_rank) * micro_batch_size
                    rows = torch.arange(first, first + micro_batch_size)[:, None]
                    whole[rows, batch.positions_l] = torch.stack([batch.tokens_Bl, batch.targets_Bl], dim=-1)
    return whole


@pytest.mark.parametrize(
    ("name", "tokens", "targets"),
    [
        ("ring", [[0, 1], [2, 3], [4, 5], [6, 7]], [[1, 2], [3, 4], [5, 6], [7, 8]]),
        ("striped", [[0, 4], [1, 5], [2, 6], [3, 7]], [[1, 5], [2, 6], [3, 7], [4, 8]]),
        ("zigzag", [[0, 7], [1, 6], [2, 5], [3, 4]], [[1, 8], [2, 7], [3, 6], [4, 5]]),
    ],
)
def test_tokens_0_to_7_on_four_ranks(store_of, name, tokens, targets):
    stream = SampleStream(store_of([range(9)]), range(1), seq_length=8, seed=1, vocab_size=9)
    layout = Layout(name, seq_length=8, ring_size=4)
    for ring_rank in range(4):
        loader = Loader(stream, layout, ring_rank, data_rank=0, data_size=1, micro_batch_size=1, global_batch_size=1)
        (batch,) = loader.next_step()
        assert batch.tokens_Bl.tolist() == [tokens[ring_rank]]
        assert batch.targets_Bl.tolist() == [targets[ring_rank]]
        assert batch.positions_l.tolist() == tokens[ring_rank]


def test_one_process_gets_the_samples_as_they_are(stream):
    loader = Loader(stream, Layout("none", S, 1), 0, 0, 1, micro_batch_size=2, global_batch_size=4)
    first, second = loader.next_step()
    for batch, indices in ((first, (0, 1)), (second, (2, 3))):
        assert batch.tokens_Bl.tolist() == [stream.sample(index)[:-1].tolist() for index in indices]
        assert batch.targets_Bl.tolist() == [stream.sample(index)[1:].tolist() for index in indices]
    assert first.tokens_Bl.dtype == first.targets_Bl.dtype == first.positions_l.dtype == torch.int64


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_size", [1, 2, 4])
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
def test_all_ranks_together_hold_what_one_process_holds(stream, layout, data_size, micro_batch_size):
    alone = steps_of(stream, Layout("none", S, 1), data_size=1, micro_batch_size=1, consumed=0, steps=5)
    together = steps_of(stream, layout, data_size, micro_batch_size, consumed=0, steps=5)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_run_resumed_on_another_grid_meets_what_it_would_have_met(stream, done):
    through = steps_of(stream, Layout("striped", S, 4), data_size=1, micro_batch_size=2, consumed=0, steps=6)
    resumed = steps_of(
        stream,
        Layout("zigzag", S, 2),
        data_size=4,
        micro_batch_size=1,
        consumed=done * GLOBAL_BATCH,
        steps=6 - done,
    )
    assert torch.equal(resumed, through[done * GLOBAL_BATCH :])


def test_consumed_samples_count_the_whole_global_batch_on_every_rank(stream):
    loader = Loader(stream, Layout("striped", S, 2), 1, 1, 2, 2, GLOBAL_BATCH, consumed_samples=24)
    loader.next_step()
    loader.next_step()
    assert loader.consumed_samples == 24 + 2 * GLOBAL_BATCH


def test_the_second_epoch_has_another_order(stream):
    loader = Loader(stream, Layout("none", S, 1), 0, 0, 1, 1, global_batch_size=stream.samples_per_epoch)
    first, second = ([batch.tokens_Bl.tolist() for batch in loader.next_step()] for _ in range(2))
    assert first != second
    assert len(first) == len(second) == stream.samples_per_epoch
