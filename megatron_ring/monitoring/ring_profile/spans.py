"""A process's log (parallel/ring_log.py) as spans: what began and ended when, and what is known of it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_ring.parallel.progress import Direction
from megatron_ring.parallel.ring_log import Event, Row

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
