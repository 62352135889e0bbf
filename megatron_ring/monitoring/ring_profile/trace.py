"""Ring traces in Chrome's JSON format, for https://ui.perfetto.dev and chrome://tracing.

A process's event log (parallel/ring_log.py) becomes spans, and the spans of all ranks become one
trace. A process of the trace is a global rank. Its first thread shows what the rank does: steps,
within them passes of the ring, within those hops, within those waits. The other threads show its
transfers, from the post to the wait that completes them; transfers that overlap are on different
threads. An arrow leads from a transfer to the one that received it. Times are microseconds since
the first span, on rank 0's clock.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_ring.monitoring.ring_profile.report import StepTime
from megatron_ring.parallel.progress import Direction
from megatron_ring.parallel.ring_log import Event, Row

COMPUTE_THREAD = 0
"""The thread id of what a rank does; its transfers have the following ids."""

BEGINNING = b'{"traceEvents": ['
"""The first bytes of a trace file."""

TraceEvent = dict[str, Any]

# Event that ends a span -> event that began it, and the span's kind.
_ENDS = {
    Event.WAITED: (Event.WAITING, "wait"),
    Event.LEFT: (Event.ENTERED, "pass"),
    Event.OPTIMIZED: (Event.OPTIMIZING, "optimizer"),
}


class Span(NamedTuple):
    """An activity of one process.

    kind: step, data, pass, hop, wait, exchange or optimizer. began, ended: time.monotonic_ns() of
    the process. attributes: shown with the span.
    """

    kind: str
    began: int
    ended: int
    attributes: dict[str, Any]


class ClockOffset(NamedTuple):
    """What to add to a process's time.monotonic_ns() to get rank 0's, and the error bound.

    Both are in nanoseconds.
    """

    nanoseconds: int
    error: int


class StepLog(NamedTuple):
    """A rank's log of one step; rows: (rows, 4) int64."""

    time: StepTime
    rows: np.ndarray

    def spans(self) -> Iterator[Span]:
        """Yield the step's spans: the step itself, its data wait, then those of the log."""
        began = self.time.began
        yield Span("step", began, began + round(self.time.seconds * 1e9), {"step": self.time.step})
        yield Span("data", began, began + round(self.time.data_seconds * 1e9), {})
        yield from log_spans(self.rows)


class RankLog(NamedTuple):
    """One rank's contribution to a trace."""

    rank: int
    node: str
    offset: ClockOffset
    steps: list[StepLog]

    def spans(self) -> list[Span]:
        """Return the spans of all recorded steps."""
        return [span for step in self.steps for span in step.spans()]


def log_spans(rows: np.ndarray) -> Iterator[Span]:
    """Yield the spans of a log, (rows, 4) int64, each as soon as it ends."""
    reader = _LogReader()
    for number, row in enumerate(map(Row._make, rows.tolist())):
        yield from reader.read(number, row)


class _LogReader:
    """Matches the rows that begin and end a span.

    latest: the last row of each event. in_flight: when each transfer was posted, and its
    attributes, keyed by the number of its row.
    """

    def __init__(self):
        self.latest: dict[int, Row] = {}
        self.in_flight: dict[int, tuple[int, dict[str, Any]]] = {}

    def read(self, number: int, row: Row) -> Iterator[Span]:
        """Take row ``number``, the next of the log, and yield the spans that it ends."""
        if row.event in (Event.HOP, Event.LEFT) and (hop := self.latest.pop(Event.HOP, None)):
            attributes = self._position(hop) | {"source": self.latest[Event.SOURCE].a}
            yield Span("hop", hop.moment, row.moment, attributes)
        if row.event in _ENDS:
            began, kind = _ENDS[row.event]
            yield Span(kind, self.latest[began].moment, row.moment, self._attributes(kind))
        elif row.event == Event.RECEIVED:
            posted, attributes = self.in_flight.pop(row.a)
            yield Span("exchange", posted, row.moment, attributes | {"received_from": row.b})
        elif row.event == Event.SENT:
            self._post(number, row)
        self.latest[row.event] = row

    def _attributes(self, kind: str) -> dict[str, Any]:
        if kind == "optimizer":
            return {}
        attributes = self._position(self.latest.get(Event.HOP))
        if kind == "wait":
            attributes["for"] = self.latest[Event.WAITING].a
        return attributes

    def _position(self, hop: Row | None) -> dict[str, Any]:
        entered = self.latest[Event.ENTERED]
        position = {"direction": Direction(entered.b).name.lower(), "layer": entered.a}
        if hop:
            position |= {"hop": hop.a, "hops": hop.b}
        return position

    def _post(self, number: int, row: Row) -> None:
        attributes = self._position(self.latest[Event.HOP]) | {"bytes": row.a, "sent_to": row.b}
        self.in_flight[number] = row.moment, attributes


def as_json(ranks: list[RankLog]) -> str:
    """Return the content of the trace file."""
    began = min(step.time.began + of.offset.nanoseconds for of in ranks for step in of.steps)
    clock_errors = {str(of.rank): of.offset.error / 1e3 for of in ranks}
    document = {
        "traceEvents": [event for of in ranks for event in _events(of, began)],
        "displayTimeUnit": "ms",
        "otherData": {"clock_error_microseconds_by_rank": clock_errors},
    }
    return json.dumps(document)


def _events(of: RankLog, began: int) -> Iterator[TraceEvent]:
    """Yield all events of a rank; ``began``: the trace's first moment on rank 0's clock."""

    def event(span: Span, thread: int) -> TraceEvent:
        return {
            "name": _name(span),
            "cat": span.kind,
            "args": span.attributes,
            "ph": "X",
            "pid": of.rank,
            "tid": thread,
            "ts": (span.began + of.offset.nanoseconds - began) / 1e3,
            "dur": (span.ended - span.began) / 1e3,
        }

    all_spans = of.spans()
    transfers = [span for span in all_spans if span.kind == "exchange"]
    transfers.sort(key=lambda span: span.began)
    threads = _assign_threads(transfers)
    yield from _names(of, max(threads, default=COMPUTE_THREAD))
    for span in all_spans:
        if span.kind != "exchange":
            yield event(span, COMPUTE_THREAD)
    slices = [event(span, thread) for span, thread in zip(transfers, threads)]
    yield from slices
    yield from _arrows(slices)


def _assign_threads(transfers: list[Span]) -> list[int]:
    """Return for each transfer the first free thread, because slices of a thread must not overlap.

    ``transfers`` are ordered by their start.
    """
    thread_ends: list[int] = []
    threads = []
    for span in transfers:
        free = len(thread_ends)
        for number, ended in enumerate(thread_ends):
            if ended <= span.began:
                free = number
                break
        thread_ends[free : free + 1] = [span.ended]
        threads.append(COMPUTE_THREAD + 1 + free)
    return threads


def _arrows(slices: list[TraceEvent]) -> Iterator[TraceEvent]:
    """Yield the start and end of the arrows between transfers of different ranks.

    The n-th transfer that a rank sends to another is the n-th that the other receives from it.
    """
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for slice in slices:
        rank = slice["pid"]
        receiver = slice["args"]["sent_to"]
        sender = slice["args"]["received_from"]
        sent[receiver] += 1
        received[sender] += 1
        arrow = {"name": "ring", "cat": "exchange", "pid": rank, "tid": slice["tid"]}
        start_id = f"{rank}-{receiver}-{sent[receiver]}"
        yield arrow | {"ph": "s", "id": start_id, "ts": slice["ts"]}
        end_id = f"{sender}-{rank}-{received[sender]}"
        # An arrow that ends exactly at the slice's end would fall outside the slice.
        just_before_end = slice["ts"] + slice["dur"] - 1e-3
        yield arrow | {"ph": "f", "bp": "e", "id": end_id, "ts": just_before_end}


def _names(of: RankLog, threads: int) -> Iterator[TraceEvent]:
    def name(kind: str, thread: int, text: str) -> TraceEvent:
        return {"ph": "M", "name": kind, "pid": of.rank, "tid": thread, "args": {"name": text}}

    yield name("process_name", COMPUTE_THREAD, f"rank {of.rank} ({of.node})")
    yield name("thread_name", COMPUTE_THREAD, "compute")
    for number in range(COMPUTE_THREAD + 1, threads + 1):
        yield name("thread_name", number, "exchange" if number == 1 else f"exchange {number}")


def _name(span: Span) -> str:
    attributes = span.attributes
    match span.kind:
        case "step":
            return f"step {attributes['step']}"
        case "pass":
            return f"{attributes['direction']}, layer {attributes['layer']}"
        case "hop":
            return f"hop {attributes['hop']} of {attributes['hops']}"
        case "wait":
            return f"waits for rank {attributes['for']}"
        case "exchange":
            return f"{attributes['bytes']:,} bytes to rank {attributes['sent_to']}"
    return span.kind
