"""What one learns all learn; what one may not do none does."""

import pytest

from megatron_ring.errors import CheckpointError, DataError
from megatron_ring.parallel.consensus import Consensus
from tests.distributed import run_ranks


def agree(rank: int, world_size: int) -> list[int]:
    consensus = Consensus.build()
    assert (consensus.rank, consensus.ranks) == (rank, world_size)
    acted = []
    assert consensus.run_on_rank_zero(lambda: acted.append(rank) or "said by 0") == "said by 0"
    assert acted == ([0] if rank == 0 else []), "nobody else acts"
    with pytest.raises(DataError, match="by 1"):
        consensus.gather(lambda: fail_on(1, rank, DataError("by 1")))
    with pytest.raises(CheckpointError, match="by 0"):
        consensus.run_on_rank_zero(lambda: fail_on(0, rank, CheckpointError("by 0")))
    assert [consensus.any_rank(rank in them) for them in ((), (1,), range(world_size))] == [
        False,
        True,
        True,
    ]
    return consensus.gather(lambda: rank * 10)


def fail_on(failing: int, rank: int, error: Exception) -> None:
    if rank == failing:
        raise error


def test_all_know_what_each_got_and_a_fault_is_everyone_s():
    assert run_ranks(3, agree) == [[0, 10, 20]] * 3
