"""Compute from a GPU trace how much of the messages' time is hidden under kernels.

A trace is a list of events as torch.profiler writes them for Chrome. Work on the device has the
category kernel, gpu_memcpy or gpu_memset, a stream, a start ``ts`` and a duration ``dur`` in
microseconds. The trace numbers streams differently than the program, so each stream is identified
by a marker: a copy of a size that no other marker has.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Event = dict[str, Any]
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


class Span(NamedTuple):
    """An interval in microseconds."""

    begin: float
    end: float


@dataclass(frozen=True)
class Overlap:
    """The messages that one rank receives, and the kernels that run meanwhile.

    Attributes:
        messages: Number of messages.
        message_time: Microseconds that the messages take in all.
        under_own: Microseconds of that during which kernels of this rank run.
        under_any: Microseconds of that during which kernels of any rank run.
        kernel_time: Microseconds during which kernels of this rank run.
    """

    messages: int
    message_time: float
    under_own: float
    under_any: float
    kernel_time: float


def overlaps(events: Sequence[Event], markers: Sequence[tuple[int, int]]) -> list[Overlap]:
    """Return the overlap of each rank.

    Args:
        markers: For each rank the sizes in bytes of the copies that mark its two streams, that of
            its hops and that of its messages. Raises ValueError if one is not in the trace.
    """
    on_device = [event for event in events if event.get("cat") in ON_DEVICE]
    marks = {size: _marker(on_device, size) for size in itertools.chain(*markers)}
    work = [event for event in on_device if event not in marks.values()]
    kernels = []
    messages = []
    for hops_size, messages_size in markers:
        on_hops = _on_stream(work, _stream(marks[hops_size]))
        kernels.append(merged(_span(event) for event in on_hops if event["cat"] == "kernel"))
        on_messages = _on_stream(work, _stream(marks[messages_size]))
        messages.append([_span(event) for event in on_messages])
    of_any_rank = merged(itertools.chain(*kernels))
    return [_overlap(received, own, of_any_rank) for received, own in zip(messages, kernels)]


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the union of ``spans`` as disjoint spans in order."""
    union: list[Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1].end:
            union[-1] = Span(union[-1].begin, max(union[-1].end, end))
        else:
            union.append(Span(begin, end))
    return union


def _overlap(messages: list[Span], own: list[Span], of_any_rank: list[Span]) -> Overlap:
    return Overlap(
        messages=len(messages),
        message_time=_length(messages),
        under_own=sum(_length_within(span, own) for span in messages),
        under_any=sum(_length_within(span, of_any_rank) for span in messages),
        kernel_time=_length(own),
    )


def _length_within(span: Span, cover: Sequence[Span]) -> float:
    return sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for begin, end in cover)


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _marker(on_device: list[Event], size: int) -> Event:
    """Return the last copy of ``size`` bytes within the device: markers come after all work."""
    copies = [
        event
        for event in on_device
        if "DtoD" in event["name"] and event["args"].get("bytes") == size
    ]
    if not copies:
        raise ValueError(f"no copy of {size} bytes in the trace")
    return max(copies, key=lambda event: event["ts"])


def _on_stream(events: list[Event], stream: int) -> Iterator[Event]:
    return (event for event in events if _stream(event) == stream)


def _stream(event: Event) -> int:
    return event["args"]["stream"]


def _span(event: Event) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"])
