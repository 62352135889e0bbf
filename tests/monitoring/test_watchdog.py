"""With a rank stopped, killed or slow, every other rank reports it and exits with code 76."""

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
from megatron_ring.monitoring.intercom import NoResponse, Peer
from megatron_ring.monitoring.watchdog import Suspensions, Watchdog, report
from megatron_ring.parallel.progress import NO_RANK, Direction, ProgressSnapshot, ProgressTracker
from tests.monitoring.stalls import TIMEOUT, Exit, Fault, Ring
from tests.parallel.single_process import SingleProcessConsensus

AT = "step 2, layer 1, backward, hop"
FAULTS = {
    "stopped": Fault(signal=signal.SIGSTOP),
    "stopped in forward": Fault(layer=0, direction=Direction.FORWARD, hop=1, signal=signal.SIGSTOP),
    "killed": Fault(signal=signal.SIGKILL),
    "asleep": Fault(sleep=60),
}
HEALTHY = {"slow": Fault(sleep=2), "none": Fault()}
HEALTHY_TIMEOUT = 60  # long enough for a healthy ring on a busy machine


@pytest.fixture(scope="module")
def exits(tmp_path_factory) -> dict[str, list[Exit]]:
    """How the ranks of each ring exited. All rings run in parallel, because most of them wait."""
    folder: Path = tmp_path_factory.mktemp("rings")
    rings = {name: Ring(folder / name, fault) for name, fault in FAULTS.items()}
    rings |= {name: Ring(folder / name, fault, HEALTHY_TIMEOUT) for name, fault in HEALTHY.items()}
    rings["unwatched"] = Ring(folder / "unwatched", ring_timeout=0)
    rings["suspended"] = Ring(folder / "suspended", Fault(sleep=2))
    rings["suspended"].suspend(TIMEOUT + 3)
    return {name: ring.wait() for name, ring in rings.items()}


def only_line(rank: Exit) -> str:
    """Return the only line on stderr, without durations and process ids."""
    [line] = [line for line in rank.stderr.splitlines() if line]
    return re.sub(r" \([^()]*, pid \d+\)", "", re.sub(r"\d+ s", "N s", line))


@pytest.mark.parametrize("name", FAULTS)
def test_every_running_rank_prints_one_line_and_exits_with_the_code_of_a_stall(name, exits):
    codes = {rank.exit_code for rank in exits[name]}
    assert codes - {None, -signal.SIGKILL} == {RingStalled.exit_code}
    for rank in (0, 2):
        line = only_line(exits[name][rank])
        assert line.startswith(f"RingStalled: rank {rank} has waited N s for rank ")
        assert exits[name][rank].losses == []


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("stopped", "is stopped by a signal"),
        ("killed", "is dead: (there is no such process|the process has exited)"),
    ],
)
def test_neighbours_report_where_they_wait_and_the_state_of_the_faulty_rank(name, state, exits):
    # Timing decides whether what rank 1 has posted for the next hop still arrives, and whether its
    # parent has reaped it.
    for rank in (0, 2):
        line = only_line(exits[name][rank])
        assert re.search(f" has waited N s for rank [01] in {AT} [23] of 3; rank [01] ", line)
        assert re.search(f"; (rank 1|.* the chain of waits ends at rank 1, which) {state}$", line)


def test_the_reported_layer_and_direction_are_those_of_the_stall(exits):
    for rank in (0, 2):
        line = only_line(exits["stopped in forward"][rank])
        assert " in step 2, layer 0, forward, hop " in line
        assert line.endswith(" is stopped by a signal")


def test_a_slow_rank_is_distinguished_from_a_stopped_one(exits):
    of_0, of_1, of_2 = (only_line(rank) for rank in exits["asleep"])
    working = f"for N s in {AT} 2 of 3"
    assert of_1.startswith("RingStalled: rank 1 ")
    assert of_1.endswith(working)
    assert "; " not in of_1, "it waits for no other rank"
    for line in (of_0, of_2):
        assert re.search("; (rank 1|.* the chain of waits ends at rank 1, which) is alive", line)
        assert line.endswith(working)


def test_a_stall_is_detected_soon_after_the_timeout(exits):
    [waited] = re.findall(r"rank 2 \(.*?\) has waited (\d+) s", exits["stopped"][2].stderr)
    assert TIMEOUT <= int(waited) <= TIMEOUT + 20


@pytest.mark.parametrize("name", [*HEALTHY, "suspended"])
def test_a_healthy_ring_trains_as_without_a_watchdog(name, exits):
    assert [rank.exit_code for rank in exits[name]] == [0, 0, 0]
    assert [rank.stderr for rank in exits[name]] == ["", "", ""]
    assert [rank.losses for rank in exits[name]] == [rank.losses for rank in exits["unwatched"]]
    assert len(exits[name][0].losses) == 3


def peer(rank: int) -> Peer:
    return Peer(rank, f"node{rank}", 4240 + rank, "", "", 0)


def waiting(for_rank: int) -> ProgressSnapshot:
    return ProgressSnapshot(12, 5, Direction.BACKWARD, 2, 4, 31.4, for_rank)


OUTSIDE = ProgressSnapshot(12, 5, 0, 0, 0, 31.4, NO_RANK)


def test_a_long_chain_of_waits_is_reported_by_its_ends():
    waits = {peer(2): waiting(1), peer(1): waiting(0), peer(0): OUTSIDE}
    first, second, last = report(peer(3), waiting(2), waits).split("; ")
    assert first == f"rank 3 (node3, pid 4243) {waiting(2)}"
    assert second == f"rank 2 (node2, pid 4242) is alive and {waiting(1)}"
    assert "ends at rank 0 (node0, pid 4240)" in last
    assert last.endswith(f"is alive and {OUTSIDE}")


def test_a_cycle_of_waits_is_reported_as_a_deadlock_of_its_ranks():
    cycle = {peer(1): waiting(0), peer(0): waiting(1)}
    for lead_in in ({}, {peer(2): waiting(1)}):
        line = report(peer(0), waiting(1), lead_in | cycle)
        assert line.endswith("; deadlock: these 2 ranks wait for each other")


def test_a_negative_timeout_is_refused():
    [problem] = ParallelConfig(ring_timeout=-1).problems()
    assert "ring_timeout -1" in problem
    assert "--ring-timeout" in problem


# ---- suspensions, and evidence of a lost rank outside the ring ----


def test_only_intervals_longer_than_expected_are_suspensions():
    suspensions = Suspensions()
    now = time.monotonic()
    suspensions.record(now - 20, now - 18.9, expected=1)
    assert suspensions.seconds_in(60) == 0
    suspensions.record(now - 18.9, now - 7.9, expected=1)
    assert suspensions.seconds_in(60) == pytest.approx(10)
    assert suspensions.longest(60) == pytest.approx(10)
    assert suspensions.longest(5) == 0


def test_only_the_part_of_a_suspension_within_the_wait_is_subtracted():
    suspensions = Suspensions()
    now = time.monotonic()
    suspensions.record(now - 31, now - 10, expected=1)
    assert suspensions.seconds_in(15) == pytest.approx(5, abs=0.5)
    assert suspensions.seconds_in(9) == 0


def test_the_number_of_recorded_suspensions_is_bounded():
    suspensions = Suspensions()
    now = time.monotonic()
    for second in range(1000):
        suspensions.record(now - 3000 + second, now - 2998 + second, expected=0)
    assert suspensions.seconds_in(1e9) <= 2 * 64


class FakeIntercom:
    """Returns the given responses of a peer one by one, and the last one from then on."""

    def __init__(self, *responses: ProgressSnapshot | NoResponse):
        self.responses = list(responses)

    def ask(self, rank: int) -> ProgressSnapshot | NoResponse:
        return self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]


ALIVE = ProgressSnapshot(1, 0, Direction.FORWARD, 0, 0, 1.0, NO_RANK)
SILENT = NoResponse("is unresponsive")
DEAD = NoResponse("is dead", has_ended=True)


@contextlib.contextmanager
def unstarted_watchdog(
    *responses: ProgressSnapshot | NoResponse, ring_timeout: int = 600
) -> Iterator[Watchdog]:
    """A watchdog without a thread, whose neighbour sends these responses."""
    watchdog = Watchdog(ProgressTracker(), 0, ring_timeout, SingleProcessConsensus())
    with contextlib.closing(watchdog.intercom):
        watchdog.intercom = FakeIntercom(*responses)
        yield watchdog


@pytest.mark.parametrize(
    ("responses", "suspected"),
    [
        ((ALIVE, ALIVE, ALIVE), False),
        ((ALIVE, DEAD, ALIVE, DEAD, ALIVE), False),
        ((ALIVE, DEAD, DEAD), True),
        ((ALIVE, SILENT, SILENT, SILENT), False),
        ((SILENT, SILENT, DEAD, DEAD), False),
    ],
    ids=["alive", "exits", "dead", "briefly silent", "behind a firewall"],
)
def test_outside_the_ring_a_neighbour_found_dead_twice_is_suspected(responses, suspected):
    with unstarted_watchdog(*responses) as watchdog:
        for _ in responses:
            watchdog._check_next(ALIVE._replace(seconds=700.0))
        assert (watchdog._suspect is not None) == suspected


@pytest.mark.parametrize(
    ("silent", "suspended", "outside", "suspected"),
    [(310, 0, 700, True), (310, 0, 500, False), (290, 0, 700, False), (900, 800, 1500, False)],
    ids=["long silence", "before the timeout", "short silence", "suspended"],
)
def test_a_neighbour_is_suspected_after_long_silence(silent, suspended, outside, suspected):
    with unstarted_watchdog(ALIVE, SILENT) as watchdog:
        watchdog._check_next(ALIVE)
        watchdog._check_next(ALIVE._replace(seconds=400.0))
        watchdog._silent_since -= silent
        now = time.monotonic()
        watchdog.suspensions.record(now - suspended - 1, now, expected=1)
        watchdog._check_next(ALIVE._replace(seconds=float(outside)))
        assert (watchdog._suspect is not None) == suspected


def test_suspended_time_does_not_count_as_waiting():
    with unstarted_watchdog(ALIVE) as watchdog:
        now = time.monotonic()
        watchdog._progress._write("seconds", time.monotonic_ns() - 100 * 10**9)
        assert watchdog.read().seconds == pytest.approx(100, abs=5)
        watchdog.suspensions.record(now - 91, now, expected=1)
        assert watchdog.read().seconds == pytest.approx(10, abs=5)


@pytest.mark.parametrize(("suspended", "ends"), [(3600, True), (30, False), (0, False)])
def test_a_torch_error_after_a_long_suspension_exits_for_a_restart(
    suspended, ends, monkeypatch, capsys
):
    monkeypatch.setattr(watchdog_module, "_GRACE_PERIOD", 0.1)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def fail(watchdog: Watchdog) -> None:
        with watchdog:
            now = time.monotonic()
            watchdog.suspensions.record(now - suspended - 1, now, expected=1)
            raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")

    with pytest.raises(RuntimeError, match="Timed out"):
        fail(Watchdog(ProgressTracker(), 0, 600, SingleProcessConsensus()))
    assert codes == [RingStalled.exit_code] * ends
    assert ("RingStalled" in capsys.readouterr().err) == ends


@pytest.mark.parametrize(
    ("responses", "suspected"),
    [((SILENT, SILENT, DEAD), True), ((SILENT, ALIVE), False), ((SILENT,), False)],
    ids=["dying", "alive", "silent"],
)
def test_after_a_torch_error_a_dying_neighbour_is_suspected(responses, suspected, monkeypatch):
    monkeypatch.setattr(watchdog_module, "_GRACE_PERIOD", 0.5)
    monkeypatch.setattr(watchdog_module, "_RETRY_INTERVAL", 0.01)
    with unstarted_watchdog(*responses) as watchdog:
        watchdog._poll_ending_neighbour()
        assert (watchdog._suspect is not None) == suspected
