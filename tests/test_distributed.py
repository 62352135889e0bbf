"""Failures in the ranks of a test are reported."""

import pytest

from tests.distributed import RankFailed, run_ranks


def fail_on_rank_one(rank: int, world_size: int, reason: str) -> None:
    if rank == 1:
        raise ValueError(reason)


def test_a_failure_is_reported_with_its_rank_and_traceback():
    with pytest.raises(
        RankFailed,
        match=r"rank 1 of 2 failed(.|\n)*fail_on_rank_one(.|\n)*ValueError: no such thing",
    ):
        run_ranks(2, fail_on_rank_one, "no such thing")
