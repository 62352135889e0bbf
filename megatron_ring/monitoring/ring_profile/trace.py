"""Spans of all ranks as one trace in Chrome's JSON, which https://ui.perfetto.dev and chrome://tracing show.

A process of the trace is a global rank. Its first thread is what the rank does: steps, passes of the ring within them,
hops within those, waits within these. The others are its transfers, from being handed over to being waited for; those
that overlap lie on several. An arrow leads from a transfer to the one that received it. Times are rank 0's, in
microseconds since the first span.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_ring.monitoring.ring_profile.recording import Offset
from megatron_ring.monitoring.ring_profile.report import StepTime
from megatron_ring.parallel.progress import Direction
from megatron_ring.parallel.ring_log import Event, Row

# A process's log (parallel/ring_log.py) as spans: what began and ended when, and what is known of it.

# Which row ends what another began, and what that was.
_ENDS = {
    Event.WAITED: (Event.WAITING, "wait"),
    Event.LEFT: (Event.ENTERED, "pass"),
    Event.OPTIMIZED: (Event.OPTIMIZING, "optimizer"),
}


class Span(NamedTuple):
    """began, ended: time.monotonic_ns() of the process. kind: step, data, pass, hop, wait, exchange or optimizer."""

    kind: str
    began: int
    ended: int
    known: dict[str, Any]


def spans(rows: np.ndarray, ring: list[int], global_rank: int) -> Iterator[Span]:
    """Of a log's rows, (rows, 4) int64, each as soon as it is over. ``ring``: the global ranks of this process's."""
    reader = _Reader(ring, ring.index(global_rank))
    for row in map(Row._make, rows.tolist()):
        yield from reader.read(row)


class _Reader:
    """begun: the row that began what is not over yet, by its event. sent: by moment, what was known when."""

    def __init__(self, ring: list[int], ring_rank: int):
        self.ring, self.ring_rank = ring, ring_rank
        self.begun: dict[int, Row] = {}
        self.sent: dict[int, dict[str, Any]] = {}
        self.onward = 1

    def read(self, row: Row) -> Iterator[Span]:
        if row.event in (Event.HOP, Event.LEFT) and (hop := self.begun.pop(Event.HOP, None)):
            yield Span(
                "hop", hop.moment, row.moment, self._place(hop) | {"source": self._source(hop.a)}
            )
        if row.event in _ENDS:
            began, kind = _ENDS[row.event]
            yield Span(kind, self.begun[began].moment, row.moment, self._known(kind))
        elif row.event == Event.RECEIVED:
            yield Span(
                "exchange", row.a, row.moment, self.sent.pop(row.a) | {"received_from": row.b}
            )
        elif row.event == Event.SENT:
            self._send(row)
        self.begun[row.event] = row

    def _known(self, kind: str) -> dict[str, Any]:
        if kind == "optimizer":
            return {}
        for_whom = {"for": self.begun[Event.WAITING].a} if kind == "wait" else {}
        return self._place(self.begun.get(Event.HOP)) | for_whom

    def _place(self, hop: Row | None) -> dict[str, Any]:
        entered = self.begun[Event.ENTERED]
        place = {"direction": Direction(entered.b).name.lower(), "layer": entered.a}
        return place | ({"hop": hop.a, "hops": hop.b} if hop else {})

    def _send(self, row: Row) -> None:
        hop = self.begun[Event.HOP]
        if (
            hop.a == 1
        ):  # what a pass sends first says which way it goes; where both are one, it does not matter
            self.onward = 1 if row.b == self.ring[(self.ring_rank + 1) % len(self.ring)] else -1
        self.sent[row.moment] = self._place(hop) | {"bytes": row.a, "sent_to": row.b}

    def _source(self, hop: int) -> int:
        """The ring rank whose keys, or whose queries, visited in a hop."""
        return (self.ring_rank - self.onward * (hop - 1)) % len(self.ring)


COMPUTE = 0
"""The number of the thread that computes; transfers have those behind it."""

BEGINNING = b'{"traceEvents": ['
"""How the file of a trace begins."""

TraceEvent = dict[str, Any]


class StepLog(NamedTuple):
    """A rank's log of a step: (rows, 4) int64."""

    time: StepTime
    rows: np.ndarray

    def spans(self, ring: list[int], rank: int) -> Iterator[Span]:
        began = self.time.began
        yield Span("step", began, began + round(self.time.seconds * 1e9), {"step": self.time.step})
        yield Span("data", began, began + round(self.time.data_seconds * 1e9), {})
        yield from spans(self.rows, ring, rank)


class RankLog(NamedTuple):
    """What a rank adds to a trace. ring: the global ranks of its ring."""

    rank: int
    node: str
    offset: Offset
    ring: list[int]
    steps: list[StepLog]

    def spans(self) -> list[Span]:
        return [span for step in self.steps for span in step.spans(self.ring, self.rank)]


def as_json(ranks: list[RankLog]) -> str:
    """The whole file."""
    began = min(step.time.began + of.offset.nanoseconds for of in ranks for step in of.steps)
    about = {
        "clock_error_microseconds_by_rank": {str(of.rank): of.offset.error / 1e3 for of in ranks}
    }
    events = [event for of in ranks for event in _events(of, began)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _events(of: RankLog, began: int) -> Iterator[TraceEvent]:
    def event(span: Span, thread: int) -> TraceEvent:
        start = (span.began + of.offset.nanoseconds - began) / 1e3
        said = {"name": _name(span), "cat": span.kind, "args": span.known}
        return said | {
            "ph": "X",
            "pid": of.rank,
            "tid": thread,
            "ts": start,
            "dur": (span.ended - span.began) / 1e3,
        }

    all_spans = of.spans()
    transfers = sorted(
        (span for span in all_spans if span.kind == "exchange"), key=lambda span: span.began
    )
    threads = _side_by_side(transfers)
    yield from _names(of, max(threads, default=COMPUTE))
    yield from (event(span, COMPUTE) for span in all_spans if span.kind != "exchange")
    slices = [event(span, thread) for span, thread in zip(transfers, threads)]
    yield from slices
    yield from _arrows(slices)


def _side_by_side(transfers: list[Span]) -> list[int]:
    """The thread of each, the first on which nothing else is at the time: slices of one may not overlap."""
    over: list[int] = []  # when the last one of each thread is
    threads = []
    for span in transfers:
        free = next((number for number, ended in enumerate(over) if ended <= span.began), len(over))
        over[free : free + 1] = [span.ended]
        threads.append(COMPUTE + 1 + free)
    return threads


def _arrows(slices: list[TraceEvent]) -> Iterator[TraceEvent]:
    """From each transfer and to it. The n-th that a rank sends to another is the n-th that this receives from it."""
    sent, received = Counter(), Counter()
    for slice in slices:
        rank, receiver, sender = (
            slice["pid"],
            slice["args"]["sent_to"],
            slice["args"]["received_from"],
        )
        sent[receiver] += 1
        received[sender] += 1
        arrow = {"name": "ring", "cat": "exchange", "pid": rank, "tid": slice["tid"]}
        yield arrow | {"ph": "s", "id": f"{rank}-{receiver}-{sent[receiver]}", "ts": slice["ts"]}
        within = slice["ts"] + slice["dur"] - 1e-3  # at its end it would be out of the slice
        yield arrow | {
            "ph": "f",
            "bp": "e",
            "id": f"{sender}-{rank}-{received[sender]}",
            "ts": within,
        }


def _names(of: RankLog, threads: int) -> Iterator[TraceEvent]:
    def name(kind: str, thread: int, words: str) -> TraceEvent:
        return {"ph": "M", "name": kind, "pid": of.rank, "tid": thread, "args": {"name": words}}

    yield name("process_name", COMPUTE, f"rank {of.rank} ({of.node})")
    yield name("thread_name", COMPUTE, "compute")
    for number in range(COMPUTE + 1, threads + 1):
        yield name("thread_name", number, "exchange" if number == 1 else f"exchange {number}")


def _name(span: Span) -> str:
    known = span.known
    match span.kind:
        case "step":
            return f"step {known['step']}"
        case "pass":
            return f"{known['direction']}, layer {known['layer']}"
        case "hop":
            return f"hop {known['hop']} of {known['hops']}"
        case "wait":
            return f"waits for rank {known['for']}"
        case "exchange":
            return f"{known['bytes']:,} bytes to rank {known['sent_to']}"
    return span.kind
