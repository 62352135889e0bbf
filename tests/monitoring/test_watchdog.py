"""A ring in which one process is stopped, killed or slow: what every other says of it, and how the job ends."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import RingStalled
from megatron_ring.monitoring import watchdog as watchdog_module
from megatron_ring.monitoring.intercom import Member, NoAnswer
from megatron_ring.monitoring.watchdog import Suspensions, Watchdog, report
from megatron_ring.parallel.progress import NO_RANK, Direction, Place, ProgressTracker
from tests.monitoring.stalls import TIMEOUT, Ended, Fault, Ring
from tests.parallel.alone import Alone

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
    rings["suspended"] = Ring(folder / "suspended", Fault(sleep=2))
    rings["suspended"].suspend(TIMEOUT + 3)
    return {name: ring.ended() for name, ring in rings.items()}


def line(rank: Ended) -> str:
    """What it said, without the seconds and the processes' ids; there must be nothing else."""
    (said,) = (each for each in rank.said.splitlines() if each)
    return re.sub(r" \([^()]*, pid \d+\)", "", re.sub(r"\d+ s", "N s", said))


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_that_runs_says_one_line_and_leaves_with_the_code_of_a_stall(name, ended):
    assert {rank.exit_code for rank in ended[name]} - {None, -signal.SIGKILL} == {
        RingStalled.exit_code
    }
    for rank in (0, 2):
        assert line(ended[name][rank]).startswith(
            f"RingStalled: rank {rank} has waited N s for rank "
        )
        assert ended[name][rank].losses == []


@pytest.mark.parametrize(
    ("name", "fate"),
    [
        ("stopped", "is stopped by a signal"),
        ("killed", "does not live: (there is no such process|it has ended)"),
    ],
)
def test_neighbours_tell_where_they_wait_and_what_became_of_the_one_they_wait_for(
    name, fate, ended
):
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
        assert re.search(
            f"; (rank 1|.* the chain of waits ends at rank 1, which) lives and {dawdles}$",
            said[rank],
        )


def test_the_wait_is_as_long_as_the_option_says_and_little_longer(ended):
    (waited,) = re.findall(r"rank 2 \(.*?\) has waited (\d+) s", ended["stopped"][2].said)
    assert TIMEOUT <= int(waited) <= TIMEOUT + 20


@pytest.mark.parametrize("name", [*HEALTHY, "suspended"])
def test_a_ring_that_moves_is_left_alone_and_its_losses_are_those_without_a_watchdog(name, ended):
    assert [rank.exit_code for rank in ended[name]] == [0, 0, 0]
    assert [rank.said for rank in ended[name]] == ["", "", ""]
    assert [rank.losses for rank in ended[name]] == [rank.losses for rank in ended["unwatched"]]
    assert len(ended[name][0].losses) == 3


def member(rank: int) -> Member:
    return Member(rank, f"node{rank}", 4240 + rank, "", "", 0)


def waiting(for_rank: int) -> Place:
    return Place(12, 5, Direction.BACKWARD, 2, 4, 31.4, for_rank)


def test_a_long_chain_of_waits_is_told_by_its_ends():
    waits = {
        member(2): waiting(1),
        member(1): waiting(0),
        member(0): Place(12, 5, 0, 0, 0, 31.4, NO_RANK),
    }
    assert report(member(3), waiting(2), waits) == (
        "rank 3 (node3, pid 4243) has waited 31 s for rank 2 in step 12, layer 5, backward, hop 2 of 4; "
        "rank 2 (node2, pid 4242) lives and has waited 31 s for rank 1 in step 12, layer 5, backward, hop 2 of 4; "
        "the chain of waits ends at rank 0 (node0, pid 4240), which lives and has been outside of the ring for 31 s, "
        "in step 12"
    )


def test_waits_that_go_round_are_called_a_circle():
    waits = {member(1): waiting(0), member(0): waiting(1)}
    assert report(member(0), waiting(1), waits).endswith(
        "; these waits close in a circle of 2 ranks"
    )


def test_a_limit_below_0_is_refused():
    problems = ParallelConfig(ring_timeout=-1).problems()
    assert problems == ["ring_timeout -1 must not be below 0. Set --ring-timeout."]


# ---- suspensions, and what counts as evidence outside of the ring ----


def test_only_what_takes_longer_than_it_should_is_a_suspension():
    suspensions, now = Suspensions(), time.monotonic()
    suspensions.took(now - 20, now - 18.9, expected=1)
    assert suspensions.seconds_in(60) == 0
    suspensions.took(now - 18.9, now - 7.9, expected=1)
    assert suspensions.seconds_in(60) == pytest.approx(10)
    assert suspensions.longest(60) == pytest.approx(10)
    assert suspensions.longest(5) == 0


def test_of_a_suspension_only_what_lies_within_the_wait_is_discounted():
    suspensions, now = Suspensions(), time.monotonic()
    suspensions.took(now - 31, now - 10, expected=1)
    assert suspensions.seconds_in(15) == pytest.approx(5, abs=0.5)
    assert suspensions.seconds_in(9) == 0


def test_the_number_of_suspensions_that_are_kept_is_limited():
    suspensions, now = Suspensions(), time.monotonic()
    for second in range(1000):
        suspensions.took(now - 3000 + second, now - 2998 + second, expected=0)
    assert suspensions.seconds_in(1e9) <= 2 * 64


class Following:
    """Stands in for the intercom; every answer is the next of ``answers``, the last one for ever."""

    def __init__(self, *answers: Place | NoAnswer):
        self.answers = list(answers)

    def ask(self, rank: int) -> Place | NoAnswer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


LIVES = Place(1, 0, Direction.FORWARD, 0, 0, 1.0, NO_RANK)
SILENT, DEAD = NoAnswer("does not answer"), NoAnswer("refuses", has_ended=True)


@contextlib.contextmanager
def looking(*answers: Place | NoAnswer, ring_timeout: int = 600) -> Iterator[Watchdog]:
    """A watchdog without a thread, whose neighbour gives these answers."""
    watchdog = Watchdog(ProgressTracker(), 0, ring_timeout, Alone())
    with contextlib.closing(watchdog.intercom):
        watchdog.intercom = Following(*answers)
        yield watchdog


@pytest.mark.parametrize(
    ("answers", "suspected"),
    [
        ((LIVES, LIVES, LIVES), False),
        ((LIVES, DEAD, LIVES, DEAD, LIVES), False),
        ((LIVES, DEAD, DEAD), True),
        ((LIVES, SILENT, SILENT, SILENT), False),
        ((SILENT, SILENT, DEAD, DEAD), False),
    ],
    ids=["lives", "leaves", "dead", "silent for a moment", "behind a firewall"],
)
def test_evidence_of_death_outside_of_the_ring(answers, suspected):
    with looking(*answers) as watchdog:
        for _ in answers:
            watchdog._look_at_following(LIVES._replace(seconds=700.0))
        assert (watchdog._suspect is not None) == suspected


@pytest.mark.parametrize(
    ("silent", "suspended", "outside", "suspected"),
    [(310, 0, 700, True), (310, 0, 500, False), (290, 0, 700, False), (900, 800, 1500, False)],
    ids=["long silence", "before the timeout", "short silence", "suspended meanwhile"],
)
def test_silence_is_evidence_once_it_has_lasted(silent, suspended, outside, suspected):
    with looking(LIVES, SILENT) as watchdog:
        watchdog._look_at_following(LIVES)
        watchdog._look_at_following(LIVES._replace(seconds=400.0))
        watchdog._silent_since -= silent
        now = time.monotonic()
        watchdog.suspensions.took(now - suspended - 1, now, expected=1)
        watchdog._look_at_following(LIVES._replace(seconds=float(outside)))
        assert (watchdog._suspect is not None) == suspected


def test_the_time_of_a_suspension_is_no_time_of_a_wait():
    with looking(LIVES) as watchdog:
        now = time.monotonic()
        watchdog._whereabouts._write("seconds", time.monotonic_ns() - 100 * 10**9)
        assert watchdog.read().seconds == pytest.approx(100, abs=5)
        watchdog.suspensions.took(now - 91, now, expected=1)
        assert watchdog.read().seconds == pytest.approx(10, abs=5)


@pytest.mark.parametrize(("suspended", "ends"), [(3600, True), (30, False), (0, False)])
def test_an_error_of_torch_after_a_long_suspension_starts_the_job_again(
    suspended, ends, monkeypatch, capsys
):
    monkeypatch.setattr(watchdog_module, "_SECONDS_TO_SPEAK", 0.1)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def fail(watchdog: Watchdog) -> None:
        with watchdog:
            now = time.monotonic()
            watchdog.suspensions.took(now - suspended - 1, now, expected=1)
            raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")

    with pytest.raises(RuntimeError, match="Timed out"):
        fail(Watchdog(ProgressTracker(), 0, 600, Alone()))
    assert codes == [RingStalled.exit_code] * ends
    assert ("RingStalled" in capsys.readouterr().err) == ends


@pytest.mark.parametrize(
    ("answers", "suspected"),
    [((SILENT, SILENT, DEAD), True), ((SILENT, LIVES), False), ((SILENT,), False)],
    ids=["ends", "lives", "silent"],
)
def test_after_an_error_of_torch_a_neighbour_that_is_ending_is_suspected(
    answers, suspected, monkeypatch
):
    monkeypatch.setattr(watchdog_module, "_SECONDS_TO_SPEAK", 0.5)
    monkeypatch.setattr(watchdog_module, "_SECONDS_BETWEEN_QUESTIONS", 0.01)
    with looking(*answers) as watchdog:
        watchdog._ask_while_it_ends()
        assert (watchdog._suspect is not None) == suspected
