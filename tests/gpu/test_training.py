"""Training on several ranks, in every pair of options, equals that of one process; and resuming.

One start of processes serves all rows of one number of ranks, at most six ranks at a time: each
takes a few GB of a shared GPU.
"""

import math
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.gpu import factors
from tests.gpu.devices import can_run, each_device, skip_without, why_ranks_cannot_share
from tests.training import tiny
from tests.training.matrix import COUNTERPARTS, Comparison, OneProcess

PHASES = {"cuda": ((4, COUNTERPARTS), (3, 2, 1)), "cpu": ((COUNTERPARTS,), (1,), (2,))}
# On a GPU no row begins later in its phase. With the last row and the starts, both phases then fit
# into the four minutes of make test-gpu.
SECONDS_OF_PHASE = 80
EACH_SIZE = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


@pytest.fixture(scope="module")
def comparisons(device, tmp_path_factory) -> dict[int, Comparison]:
    """All rows, compared; by the number of processes."""
    skip_without(device)
    if can_run(device, 4):
        skip_without(device, ranks=4)  # prepares the environment
    folder = tmp_path_factory.mktemp("corpora")
    corpora = {"ignored": tiny.write_store(folder), "masked": tiny.write_short_documents(folder)}
    phases = [
        [size for size in phase if size == COUNTERPARTS or can_run(device, size)]
        for phase in PHASES[device]
    ]
    seconds = SECONDS_OF_PHASE if device == "cuda" else math.inf
    # On a CPU the tests only need to show that they work.
    steps = factors.STEPS if device == "cuda" else 2
    one_process = OneProcess(factors.MATRIX, corpora, steps, device, seconds)
    rows = factors.rows(device)
    return one_process.compare_concurrently(rows, list(filter(None, phases)), factors.tolerance)


@EACH_SIZE
@each_device
def test_ranks_train_as_one_process(world_size, device, comparisons):
    if device == "cpu" and world_size > 2:
        pytest.skip("on a CPU tests/training/test_matrix.py has these")
    if world_size not in comparisons:
        pytest.skip(why_ranks_cannot_share())
    compared = comparisons[world_size]
    assert compared.rows > 0
    assert compared.differences == {}
    if compared.left_out:
        pytest.skip(f"out of time: {compared.left_out} rows left out, {compared.rows} are right")


GRIDS = (
    ({"context_parallel_size": 2}, {"zero_stage": 1}),
    ({"context_parallel_size": 2, "ulysses_degree": 2}, {"zero_stage": 3}),
)
"""A run on the first grid is resumed on the second."""


def save_and_resume(
    rank: int, world_size: int, folder: Path, prefix: Path, dtypes: list[str]
) -> dict[str, tuple]:
    """Return (loss, gradient norm) of the steps after a checkpoint, of both runs, by dtype."""
    found = {}
    for dtype in dtypes:
        path = str(folder / dtype)
        runs = [
            tiny.Run(
                tiny.config(
                    parallel=parallel,
                    training=training | {"dtype": dtype, "adam_eps": 1e-3},
                    checkpoint={"save": path, "load": path},
                ),
                prefix,
                rank,
                world_size,
            )
            for parallel, training in GRIDS
        ]
        uninterrupted, resumed = runs
        uninterrupted.steps(2)
        uninterrupted.save()
        expected = uninterrupted.steps(2)
        resumed.resume(resumed.find())
        found[dtype] = expected, resumed.steps(2)
    return found


@each_device
def test_a_run_resumes_on_another_grid(device, tmp_path):
    skip_without(device, ranks=2)
    dtypes = ["fp32", "bf16", "fp16"] if device == "cuda" else ["fp32", "bf16"]
    prefix = tiny.write_store(tmp_path)
    for of_rank in run_ranks(2, save_and_resume, tmp_path, prefix, dtypes, device=device):
        for dtype, (expected, resumed) in of_rank.items():
            limits = factors.TOLERANCE[dtype][:2]
            errors = (torch.tensor(resumed) / torch.tensor(expected) - 1).abs().amax(0).tolist()
            assert all(error <= limit for error, limit in zip(errors, limits)), (dtype, errors)
