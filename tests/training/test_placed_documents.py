"""Documents placed by size: training equals that of one process, on every grid, also resumed.

--steps-of-pairs steps: 2, or 20 in ``make test-all``.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.data.tokens import TokenStoreWriter
from tests.distributed import run_ranks
from tests.training import tiny
from tests.training.trained import Trained, differences

SEQ = 1024  # Blocks are 128 tokens: with two ring ranks each owns four.
PACKED = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
# adam_eps: see factors.py
TRAINING = {"micro_batch_size": 2, "global_batch_size": 2, "adam_eps": 1e-3}
PLACED = {"document_placement": "auto"}

# By number of processes: parallel and training options, and those of the model and the data.
GRIDS = {
    2: {
        "ZeRO 1": (PLACED, {"zero_stage": 1}, {}, {}),
        "ZeRO 3": (PLACED, {"zero_stage": 3}, {}, {}),
        "a window and sinks": (
            PLACED,
            {},
            {"window_size": 100, "window_attn_skip_freq": 2, "softmax_type": "learnable"},
            {},
        ),
        "equal heads, so that queries travel": (PLACED, {}, {"num_query_groups": 4}, {}),
        "positions in the sample": (PLACED, {}, {}, {"reset_position_ids": False}),
        "a ragged length": (PLACED, {}, {}, {"seq_length": 999}),
    },
    4: {
        "tensor 2": (PLACED | {"tensor_model_parallel_size": 2}, {}, {}, {}),
        "pipeline 2": (PLACED | {"pipeline_model_parallel_size": 2}, {}, {}, {}),
        "Ulysses 2": (PLACED | {"ulysses_degree": 2}, {}, {}, {}),
        "two data ranks, samples assigned by work": (
            PLACED | {"context_parallel_size": 2},
            {"micro_batch_size": 1},
            {},
            {"sample_assignment": "by-work"},
        ),
    },
}


def config(parallel: dict, training: dict, model: dict, data: dict):
    return tiny.config(
        parallel=parallel,
        training=TRAINING | training,
        model=model,
        data={"seq_length": SEQ} | PACKED | data,
    )


def train_all(
    rank: int, world_size: int, prefix: Path, cases: dict, steps: int
) -> dict[str, Trained]:
    found = {}
    for name, options in cases.items():
        run = tiny.Run(config(*options), prefix, rank, world_size)
        if options[0] == PLACED:
            assert samples_placed(run) > 1, f"{name} places nothing"
        found[name] = Trained.after(run, steps)
    return found


def samples_placed(run: tiny.Run) -> int:
    """Return how many samples of the next steps do not keep the layout's order; goes back after."""
    batches = [batch for _ in range(6) for batch in run.loader.next_step()]
    layout = run.setup.layout
    placements = [p for b in batches for p in place_samples(b.document_starts, 2, layout)]
    run._load_from(consumed_samples=0)
    return sum(placement is not None for placement in placements)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """A store with documents of 20 to 100 tokens, and of 300 to 900."""
    folder = tmp_path_factory.mktemp("documents")
    generator = np.random.default_rng(0)
    with TokenStoreWriter(folder / "mixed", np.uint16) as writer:
        for number in range(400):
            length = (
                generator.integers(300, 900) if number % 12 == 0 else generator.integers(20, 100)
            )
            steps = generator.choice([1, 2, 5], size=length)
            tokens = 1 + np.cumsum(steps) % (tiny.VOCAB - 1)
            writer.add_document([*tokens, tiny.END_OF_DOCUMENT])
    return folder / "mixed"


@pytest.fixture(scope="module")
def steps(pytestconfig) -> int:
    return pytestconfig.getoption("steps_of_pairs")


def mathematics(name: str) -> tuple[dict, dict]:
    """Return the options of a case that change what is computed, of the model and the data."""
    [(_, _, model, data)] = [grid[name] for grid in GRIDS.values() if name in grid]
    return model, {key: value for key, value in data.items() if key != "sample_assignment"}


@pytest.fixture(scope="module")
def alone(prefix, steps) -> dict[str, Trained]:
    """The results of one process for each of the cases; those that compute the same share one."""
    names = [name for grid in GRIDS.values() for name in grid]
    cases = {
        str(mathematics(name)): ({"context_parallel": "none"}, {}, *mathematics(name))
        for name in names
    }
    found = run_ranks(1, train_all, prefix, cases, steps)[0]
    return {name: found[str(mathematics(name))] for name in names}


@pytest.mark.whole
@pytest.mark.parametrize("world_size", GRIDS)
def test_placed_documents_train_as_on_one_process(world_size, alone, prefix, steps):
    of_ranks = run_ranks(world_size, train_all, prefix, GRIDS[world_size], steps)
    for name in GRIDS[world_size]:
        found = [of_rank[name] for of_rank in of_ranks]
        assert differences(found, alone[name]) == [], name


def save_or_resume(rank: int, world_size: int, prefix: Path, folder: Path) -> list:
    """Train and save on two ranks, resume on one; return the two steps after the checkpoint."""
    parallel = PLACED if world_size == 2 else {"context_parallel": "none"}
    options = config(parallel, {}, {}, {})
    options = replace(
        options, checkpoint=replace(options.checkpoint, save=str(folder), load=str(folder))
    )
    run = tiny.Run(options, prefix, rank, world_size)
    if world_size == 2:
        run.steps(2)
        run.save()
    else:
        run.resume(run.find())
    return run.steps(2)


def test_a_run_with_placed_documents_resumes_on_another_grid(prefix, tmp_path):
    placed, _ = run_ranks(2, save_or_resume, prefix, tmp_path)
    (resumed,) = run_ranks(1, save_or_resume, prefix, tmp_path)
    assert np.array(resumed) == pytest.approx(np.array(placed), rel=1e-5)
