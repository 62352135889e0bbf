"""A ring in which one process is stopped, killed or slow: what every other says of it, and how the job ends."""

import re
import signal
from pathlib import Path

import pytest

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import RingStalled
from megatron_ring.parallel.intercom import Member
from megatron_ring.parallel.watchdog import report
from megatron_ring.parallel.whereabouts import NOBODY, Direction, Place
from tests.parallel.stalls import TIMEOUT, Ended, Fault, Ring

AT = "step 2, layer 1, backward, hop"
FAULTS = {
    "stopped": Fault(signal=signal.SIGSTOP),
    "stopped in forward": Fault(layer=0, direction=Direction.FORWARD, hop=1, signal=signal.SIGSTOP),
    "killed": Fault(signal=signal.SIGKILL),
    "asleep": Fault(sleep=60),
}
HEALTHY = {"slow": Fault(sleep=2), "none": Fault()}
PATIENCE = 60  # of those in which nothing is wrong, however busy the machine


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, list[Ended]]:
    """How the ranks of each ring ended; all rings run at the same time, because most of them only wait."""
    folder: Path = tmp_path_factory.mktemp("rings")
    rings = {name: Ring(folder / name, fault) for name, fault in FAULTS.items()}
    rings |= {name: Ring(folder / name, fault, PATIENCE) for name, fault in HEALTHY.items()}
    rings["unwatched"] = Ring(folder / "unwatched", ring_timeout=0)
    return {name: ring.ended() for name, ring in rings.items()}


def line(rank: Ended) -> str:
    """What it said, without the seconds and the processes' ids; there must be nothing else."""
    (said,) = (each for each in rank.said.splitlines() if each)
    return re.sub(r" \([^()]*, pid \d+\)", "", re.sub(r"\d+ s", "N s", said))


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_that_runs_says_one_line_and_leaves_with_the_code_of_a_stall(name, ended):
    assert {rank.exit_code for rank in ended[name]} - {None, -signal.SIGKILL} == {RingStalled.exit_code}
    for rank in (0, 2):
        assert line(ended[name][rank]).startswith(f"RingStalled: rank {rank} has waited N s for rank ")
        assert ended[name][rank].losses == []


@pytest.mark.parametrize(
    ("name", "fate"),
    [("stopped", "is stopped by a signal"), ("killed", "does not live: (there is no such process|it has ended)")],
)
def test_neighbours_tell_where_they_wait_and_what_became_of_the_one_they_wait_for(name, fate, ended):
    # Whether what rank 1 has posted for the next hop still arrives is a matter of moments, and so is whether its parent
    # has taken notice of its end.
    for rank in (0, 2):
        said = line(ended[name][rank])
        assert re.search(f" has waited N s for rank [01] in {AT} [23] of 3; rank [01] ", said)
        assert re.search(f"; (rank 1|.* the chain of waits ends at rank 1, which) {fate}$", said)


def test_the_layer_and_the_direction_are_those_of_the_stall(ended):
    for rank in (0, 2):
        said = line(ended["stopped in forward"][rank])
        assert " in step 2, layer 0, forward, hop " in said
        assert said.endswith(" is stopped by a signal")


def test_one_that_only_dawdles_is_told_from_one_that_is_stopped(ended):
    dawdles = f"has been at work for N s in {AT} 2 of 3"
    said = [line(rank) for rank in ended["asleep"]]
    assert said[1] == f"RingStalled: rank 1 {dawdles}"
    for rank in (0, 2):
        assert re.search(f"; (rank 1|.* the chain of waits ends at rank 1, which) lives and {dawdles}$", said[rank])


def test_the_wait_is_as_long_as_the_option_says_and_little_longer(ended):
    (waited,) = re.findall(r"rank 2 \(.*?\) has waited (\d+) s", ended["stopped"][2].said)
    assert TIMEOUT <= int(waited) <= TIMEOUT + 20


@pytest.mark.parametrize("name", HEALTHY)
def test_a_ring_that_moves_is_left_alone_and_its_losses_are_those_without_a_watchdog(name, ended):
    assert [rank.exit_code for rank in ended[name]] == [0, 0, 0]
    assert [rank.said for rank in ended[name]] == ["", "", ""]
    assert [rank.losses for rank in ended[name]] == [rank.losses for rank in ended["unwatched"]]
    assert len(ended[name][0].losses) == 3


def member(rank: int) -> Member:
    return Member(rank, f"node{rank}", 4240 + rank, "", 0)


def waiting(for_rank: int) -> Place:
    return Place(12, 5, Direction.BACKWARD, 2, 4, 31.4, for_rank)


def test_a_long_chain_of_waits_is_told_by_its_ends():
    waits = {member(2): waiting(1), member(1): waiting(0), member(0): Place(12, 5, 0, 0, 0, 31.4, NOBODY)}
    assert report(member(3), waiting(2), waits) == (
        "rank 3 (node3, pid 4243) has waited 31 s for rank 2 in step 12, layer 5, backward, hop 2 of 4; "
        "rank 2 (node2, pid 4242) lives and has waited 31 s for rank 1 in step 12, layer 5, backward, hop 2 of 4; "
        "the chain of waits ends at rank 0 (node0, pid 4240), which lives and has been outside of the ring for 31 s, "
        "in step 12"
    )


def test_waits_that_go_round_are_called_a_circle():
    waits = {member(1): waiting(0), member(0): waiting(1)}
    assert report(member(0), waiting(1), waits).endswith("; these waits close in a circle of 2 ranks")


def test_a_limit_below_0_is_refused():
    problems = ParallelConfig(ring_timeout=-1).problems()
    assert problems == ["ring_timeout -1 must not be below 0. Set --ring-timeout."]
