"""Every rank gets every rank's result, and an error of one rank is raised on all."""

import pytest

from megatron_ring.errors import CheckpointError, DataError
from megatron_ring.parallel.consensus import Consensus
from tests.distributed import run_ranks


def reach_consensus(rank: int, world_size: int) -> list[int]:
    consensus = Consensus.build()
    assert (consensus.rank, consensus.ranks) == (rank, world_size)
    calls = []
    result = consensus.run_on_rank_zero(lambda: calls.append(rank) or "result of rank 0")
    assert result == "result of rank 0"
    assert calls == ([0] if rank == 0 else []), "only rank 0 runs the function"
    with pytest.raises(DataError, match="by 1"):
        consensus.gather(lambda: fail_on(1, rank, DataError("by 1")))
    with pytest.raises(CheckpointError, match="by 0"):
        consensus.run_on_rank_zero(lambda: fail_on(0, rank, CheckpointError("by 0")))
    assert not consensus.any_rank(False)
    assert consensus.any_rank(rank == 1)
    assert consensus.any_rank(True)
    return consensus.gather(lambda: rank * 10)


def fail_on(failing: int, rank: int, error: Exception) -> None:
    if rank == failing:
        raise error


def test_results_and_errors_reach_all_ranks():
    assert run_ranks(3, reach_consensus) == [[0, 10, 20]] * 3
