"""One token stream: the global batches put together from all ranks of a grid are those of one process.

For a blend and every packing, over pipe, data, ring, Ulysses and tensor ranks, interrupted or not. Each rank opens the
data for itself, as the processes of a run do, though of a pipeline only the first stage is given any.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ring.config import DataConfig
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.data.stages import LaterStageLoader, loader_of
from megatron_ring.parallel.grid import Coordinates, Grid

S = 24
GLOBAL_BATCH = 8
STEPS = 4
ALONE = ("none", Grid())
GRIDS = [
    ("none", Grid(data=4)),
    ("striped", Grid(ring=3, tensor=2)),
    ("zigzag", Grid(pipe=2, data=2, ring=2)),
    ("ring", Grid(ring=2, ulysses=2, tensor=2)),
    ("striped", Grid(pipe=2, data=2, ring=2, ulysses=2, tensor=2)),
]
STREAMS = {
    "one store": {},
    "a blend": {"blend": True},
    "greedy": {"packing": "greedy"},
    "best-fit": {"packing": "best-fit"},
    "a blend, best-fit, documents apart": {"blend": True, "packing": "best-fit", "apart": True},
    "a blend, documents apart": {"blend": True, "apart": True},
}


@pytest.fixture(scope="module")
def base(store_of, tokenizer, tmp_path_factory) -> DataConfig:
    """A small and a large store of documents of 1 to 60 tokens; the small one goes round within the test."""
    generator, end = np.random.default_rng(0), tokenizer.end_of_document
    stores = [
        store_of(
            [
                [*generator.integers(4, 300, size=n), end]
                for n in generator.integers(0, 60, size=documents)
            ]
        )
        for documents in (9, 60)
    ]
    model = tmp_path_factory.mktemp("tokenizer") / "the.model"
    tokenizer.save(model)
    path = ("0.7", str(stores[0].prefix), "0.3", str(stores[1].prefix))
    return DataConfig(path, str(model), split=(1.0, 0.0), seq_length=S)


@pytest.fixture(params=STREAMS)
def config(request, base) -> DataConfig:
    asked = dict(STREAMS[request.param])
    path = base.data_path if asked.pop("blend", False) else base.data_path[3:]
    flags = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    return replace(base, data_path=path, **dict.fromkeys(flags, asked.pop("apart", False)), **asked)


def opened(
    config: DataConfig, layout: Layout, grid: Grid, at: Coordinates, consumed: int
) -> Loader | LaterStageLoader:
    dataset = Dataset.open(config, seed=3)
    sizes = GLOBAL_BATCH // grid.data // 2, GLOBAL_BATCH
    return loader_of(dataset.training, dataset.packing, layout, grid, at, *sizes, consumed)


def known(batch: Batch) -> torch.Tensor:
    """What a rank knows of each of its tokens, (B, l, 3): itself, its target, its position."""
    return torch.stack(
        [batch.tokens_Bl, batch.targets_Bl, batch.positions.expand_as(batch.tokens_Bl)], dim=-1
    )


def starts_of_samples(batch: Batch) -> list[list[int]]:
    """Where the documents of each sample begin."""
    if batch.document_starts is None:
        return [[0]] * len(batch.tokens_Bl)
    sample_of, starts = batch.document_starts // S, batch.document_starts % S
    return [starts[sample_of == b].tolist() for b in range(len(batch.tokens_Bl))]


def put_together(
    config: DataConfig, name: str, grid: Grid, steps: range
) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
    """The global batches of ``steps``, (samples, S, 3), and of each sample the documents, as every rank has them."""
    layout = Layout(name, S, grid.ring)
    whole = torch.full((len(steps) * GLOBAL_BATCH, S, 3), -1)
    documents: dict[int, list[list[int]]] = {}
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        loader = opened(config, layout, grid, at, steps.start * GLOBAL_BATCH)
        places = layout.positions(at.ring, at.ulysses, grid.ulysses)
        batches = [batch for _ in steps for batch in loader.next_step()]
        assert loader.consumed_samples == steps.stop * GLOBAL_BATCH
        assert bool(batches) == (at.pipe == 0), "what later stages need travels to them"
        for micro, batch in enumerate(batches):
            rows = torch.arange(len(batch.tokens_Bl)) + (micro * grid.data + at.data) * len(
                batch.tokens_Bl
            )
            held = whole[rows[:, None], places]
            # Tensor ranks have the same tokens as their fellows.
            assert (held == -1).all() or torch.equal(held, known(batch))
            whole[rows[:, None], places] = known(batch)
            for row, starts in zip(rows.tolist(), starts_of_samples(batch)):
                assert documents.setdefault(row, starts) == starts
    return whole, documents


def test_every_grid_has_the_tokens_of_one_process(config):
    whole, documents = put_together(config, *ALONE, range(STEPS))
    assert (whole[..., 0] >= 0).all()
    for name, grid in GRIDS:
        together, found = put_together(config, name, grid, range(STEPS))
        assert torch.equal(together, whole), grid
        assert found == documents, grid


@pytest.mark.parametrize("done", [1, 3])
def test_a_run_interrupted_and_resumed_on_another_grid_meets_the_rest(config, done):
    whole, _ = put_together(config, *ALONE, range(STEPS))
    before, _ = put_together(config, *GRIDS[2], range(done))
    after, _ = put_together(config, *GRIDS[1], range(done, STEPS))
    assert torch.equal(torch.cat([before, after]), whole)


def test_a_run_resumed_from_what_a_prefetcher_handed_out_meets_the_rest(config):
    """What lay ready when the run was interrupted is prepared again."""
    name, grid = GRIDS[2]
    asked = config, Layout(name, S, grid.ring), grid, grid.coordinates(1)
    through, consumed, met = opened(*asked, 0), 0, []
    for _ in range(2):
        with Prefetcher(opened(*asked, consumed)) as ahead:
            met += [batch for _ in range(2) for batch in ahead.next_step()]
            consumed = ahead.consumed_samples
    expected = [batch for _ in range(4) for batch in through.next_step()]
    assert consumed == through.consumed_samples
    assert [known(batch).tolist() for batch in met] == [known(batch).tolist() for batch in expected]


def test_the_blend_has_both_stores_as_often_as_they_weigh(base):
    """22 of the 32 samples, 0.7 of them to within one half, are the small store's, which has been round by then."""
    alone = [
        Dataset.open(replace(base, data_path=base.data_path[n : n + 1]), seed=3).training
        for n in (1, 3)
    ]
    blended = Dataset.open(base, seed=3).training
    samples = [blended.sample(index).tolist() for index in range(STEPS * GLOBAL_BATCH)]
    taken = [
        [stream.sample(index).tolist() for index in range(count)]
        for stream, count in zip(alone, (22, 10))
    ]
    assert sorted(samples) == sorted(taken[0] + taken[1])
    assert alone[0].samples_per_epoch < 22


def test_fill_predicts_nothing_and_is_seen_by_nothing(base, tokenizer):
    """Behind a document that leaves room, each place is a document of its own, ends at once and counts for nothing."""
    flags = dict.fromkeys(("reset_attention_mask", "reset_position_ids", "eod_mask_loss"), True)
    config = replace(base, data_path=base.data_path[3:], packing="greedy", **flags)
    stream = Dataset.open(config, seed=3).training
    filled = next(
        index
        for index in range(stream.samples_per_epoch)
        if (stream.sample(index)[:-1] < 0).sum() > 2
    )
    text = int((stream.sample(filled) >= 0).sum())
    first = filled // GLOBAL_BATCH * GLOBAL_BATCH
    loader = opened(config, Layout("none", S, 1), Grid(), Coordinates(0, 0, 0, 0, 0), first)
    batch = loader.next_step()[filled % GLOBAL_BATCH // 4]
    row = filled % 4
    assert batch.tokens_Bl[row, text:].tolist() == [tokenizer.end_of_document] * (S - text)
    assert batch.targets_Bl[row, text - 1 :].tolist() == [-100] * (S - text + 1)
    assert batch.positions[row, text:].tolist() == [0] * (S - text)
    assert starts_of_samples(batch)[row][-(S - text) :] == list(range(text, S))
