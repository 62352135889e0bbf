"""The global batches assembled from all ranks of a grid equal those of one process.

Tested for a blend and every packing, over pipeline, data, ring, Ulysses and tensor ranks, with and
without an interruption. Each rank opens the data itself, as the processes of a run do; of a
pipeline only the first stage reads any.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ring.config import DataConfig
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.loader import Batch, LaterStageLoader, Loader, build_loader
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.parallel.grid import Coordinates, Grid
from tests.data.test_loader import token_target_position

S = 24
GLOBAL_BATCH = 8
STEPS = 4
ONE_PROCESS = ("none", Grid())
GRIDS = [
    ("none", Grid(data=4)),
    ("striped", Grid(ring=3, tensor=2)),
    ("zigzag", Grid(pipe=2, data=2, ring=2)),
    ("ring", Grid(ring=2, ulysses=2, tensor=2)),
    ("striped", Grid(pipe=2, data=2, ring=2, ulysses=2, tensor=2)),
]
BOUNDARY_FLAGS = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
STREAMS = {
    "one store": {},
    "a blend": {"blend": True},
    "greedy": {"packing": "greedy"},
    "best-fit": {"packing": "best-fit"},
    "balanced": {"packing": "balanced"},
    "a blend, best-fit, boundaries": {"blend": True, "packing": "best-fit", "boundaries": True},
    "a blend, boundaries": {"blend": True, "boundaries": True},
}


@pytest.fixture(scope="module")
def base(store_of, tokenizer, tmp_path_factory) -> DataConfig:
    """A small and a large store of documents of 1 to 60 tokens.

    The small one is read for more than one epoch within a test.
    """
    generator = np.random.default_rng(0)
    stores = []
    for documents in (9, 60):
        lengths = generator.integers(0, 60, size=documents)
        end = tokenizer.end_of_document
        stores.append(store_of([[*generator.integers(4, 300, size=n), end] for n in lengths]))
    model = tmp_path_factory.mktemp("tokenizer") / "the.model"
    tokenizer.save(model)
    path = ("0.7", str(stores[0].prefix), "0.3", str(stores[1].prefix))
    return DataConfig(path, str(model), split=(1.0, 0.0), seq_length=S)


@pytest.fixture(params=STREAMS)
def config(request, base) -> DataConfig:
    options = dict(STREAMS[request.param])
    path = base.data_path if options.pop("blend", False) else base.data_path[3:]
    flags = dict.fromkeys(BOUNDARY_FLAGS, options.pop("boundaries", False))
    return replace(base, data_path=path, **flags, **options)


def open_loader(
    config: DataConfig, layout: Layout, grid: Grid, at: Coordinates, consumed: int
) -> Loader | LaterStageLoader:
    dataset = Dataset.open(config, seed=3)
    return build_loader(
        dataset.training,
        dataset.boundaries,
        layout,
        grid,
        at,
        micro_batch_size=GLOBAL_BATCH // grid.data // 2,
        global_batch_size=GLOBAL_BATCH,
        consumed_samples=consumed,
    )


def starts_by_sample(batch: Batch) -> list[list[int]]:
    """The positions in each sample where its documents begin."""
    if batch.document_starts is None:
        return [[0]] * len(batch.tokens_Bl)
    sample_of = batch.document_starts // S
    starts = batch.document_starts % S
    return [starts[sample_of == b].tolist() for b in range(len(batch.tokens_Bl))]


def assemble(
    config: DataConfig, name: str, grid: Grid, steps: range
) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
    """Read the global batches of ``steps`` on every rank and assemble them.

    Returns (samples, S, 3) and the document starts of each sample, on which all ranks must agree.
    """
    layout = Layout(name, S, grid.ring)
    whole = torch.full((len(steps) * GLOBAL_BATCH, S, 3), -1)
    documents: dict[int, list[list[int]]] = {}
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        loader = open_loader(config, layout, grid, at, steps.start * GLOBAL_BATCH)
        positions_l = layout.positions(at.ring, at.ulysses, grid.ulysses)
        batches = [batch for _ in steps for batch in loader.next_step()]
        assert loader.consumed_samples == steps.stop * GLOBAL_BATCH
        assert bool(batches) == (at.pipe == 0), "later stages read nothing"
        for micro, batch in enumerate(batches):
            samples = len(batch.tokens_Bl)
            rows = torch.arange(samples) + (micro * grid.data + at.data) * samples
            index = (rows[:, None], positions_l)
            # Tensor ranks read the same tokens as one another.
            is_unread = (whole[index] == -1).all()
            assert is_unread or torch.equal(whole[index], token_target_position(batch))
            whole[index] = token_target_position(batch)
            for row, starts in zip(rows.tolist(), starts_by_sample(batch)):
                assert documents.setdefault(row, starts) == starts
    return whole, documents


def test_every_grid_reads_the_tokens_of_one_process(config):
    whole, documents = assemble(config, *ONE_PROCESS, range(STEPS))
    assert (whole[..., 0] >= 0).all()
    for name, grid in GRIDS:
        grid_whole, grid_documents = assemble(config, name, grid, range(STEPS))
        assert torch.equal(grid_whole, whole), grid
        assert grid_documents == documents, grid


@pytest.mark.parametrize("done", [1, 3])
def test_a_run_resumed_on_another_grid_reads_the_remaining_samples(config, done):
    whole, _ = assemble(config, *ONE_PROCESS, range(STEPS))
    before, _ = assemble(config, *GRIDS[2], range(done))
    after, _ = assemble(config, *GRIDS[1], range(done, STEPS))
    assert torch.equal(torch.cat([before, after]), whole)


def test_a_run_resumed_after_prefetching_reads_the_remaining_samples(config):
    """Steps that were prepared but not returned before the interruption are prepared again."""
    name, grid = GRIDS[2]
    arguments = config, Layout(name, S, grid.ring), grid, grid.coordinates(1)
    consumed = 0
    batches = []
    for _ in range(2):
        with Prefetcher(open_loader(*arguments, consumed)) as ahead:
            batches += [batch for _ in range(2) for batch in ahead.next_step()]
            consumed = ahead.consumed_samples
    uninterrupted = open_loader(*arguments, 0)
    expected = [batch for _ in range(4) for batch in uninterrupted.next_step()]
    assert consumed == uninterrupted.consumed_samples
    assert len(batches) == len(expected)
    for batch, expected_batch in zip(batches, expected):
        assert torch.equal(token_target_position(batch), token_target_position(expected_batch))


def test_a_blend_reads_both_stores_in_proportion_to_their_weights(base):
    """Of 32 samples 22 (0.7 x 32 to within 1/2) are of the small store, more than its epoch."""
    small, large = (
        Dataset.open(replace(base, data_path=base.data_path[n : n + 1]), seed=3).training
        for n in (1, 3)
    )
    blended = Dataset.open(base, seed=3).training
    samples = [blended.sample(index).tolist() for index in range(STEPS * GLOBAL_BATCH)]
    from_small = [small.sample(index).tolist() for index in range(22)]
    from_large = [large.sample(index).tolist() for index in range(10)]
    assert sorted(samples) == sorted(from_small + from_large)
    assert small.samples_per_epoch < 22


def test_padding_has_no_targets_and_is_attended_by_no_text(base, tokenizer):
    """Each padding position is a document of its own, an end-of-document token without target."""
    flags = dict.fromkeys(BOUNDARY_FLAGS, True)
    config = replace(base, data_path=base.data_path[3:], packing="greedy", **flags)
    stream = Dataset.open(config, seed=3).training
    padded = next(
        index
        for index in range(stream.samples_per_epoch)
        if (stream.sample(index)[:-1] < 0).sum() > 2
    )
    text = int((stream.sample(padded) >= 0).sum())
    first = padded // GLOBAL_BATCH * GLOBAL_BATCH
    loader = open_loader(config, Layout("none", S, 1), Grid(), Coordinates(0, 0, 0, 0, 0), first)
    batch = loader.next_step()[padded % GLOBAL_BATCH // 4]
    row = padded % 4
    assert batch.tokens_Bl[row, text:].tolist() == [tokenizer.end_of_document] * (S - text)
    assert batch.targets_Bl[row, text - 1 :].tolist() == [-100] * (S - text + 1)
    assert batch.positions[row, text:].tolist() == [0] * (S - text)
    assert starts_by_sample(batch)[row][-(S - text) :] == list(range(text, S))
