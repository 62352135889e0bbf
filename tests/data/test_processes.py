"""Processes: results in order, the first failure raised, a killed process told, and none left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_ring.data.processes import in_order, pool_of
from megatron_ring.errors import DataError


def slow_first(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0)
    return number


def fail_from_two(number: int) -> int:
    if number >= 2:
        raise DataError(f"job {number}")
    return number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ahead", [0, 1, 9])
def test_results_come_in_the_order_of_the_jobs_each_with_its_own(ahead):
    with pool_of(2) as pool:
        assert list(in_order(pool, slow_first, range(4), ahead)) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_no_more_jobs_are_taken_ahead_than_asked_for():
    taken = []
    with pool_of(1) as pool:
        results = in_order(
            pool, slow_first, (taken.append(number) or number for number in range(9)), ahead=2
        )
        for number in range(3):
            assert next(results) == (number, number)
            assert taken == list(range(number + 3))


def test_the_first_job_to_fail_is_the_one_that_is_told():
    with pool_of(2) as pool:
        results = in_order(pool, fail_from_two, range(9))
        assert [next(results), next(results)] == [(0, 0), (1, 1)]
        with pytest.raises(DataError, match="job 2"):
            next(results)


def test_a_killed_process_is_told():
    with (
        pytest.raises(
            DataError, match=r"was killed, perhaps for want of memory\. Set --workers lower"
        ),
        pool_of(2) as pool,
    ):
        list(in_order(pool, die, range(2)))


PARENT = """
import os, signal
from megatron_ring.data.processes import in_order, pool_of
def getpid(_):
    return os.getpid()
if __name__ == "__main__":
    with pool_of(1) as pool:
        for _, process_id in in_order(pool, getpid, range(1)):
            print(process_id, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_a_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    told = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, timeout=60
    )
    child = int(told.stdout)
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process_id: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
