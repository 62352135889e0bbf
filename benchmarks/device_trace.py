"""What a device's trace says of overlap: for how much of the time in which messages travel there are kernels at work.

A trace is a list of events as torch.profiler writes them for Chrome. What runs on the device is of the category kernel,
gpu_memcpy or gpu_memset, has a stream, begins at ``ts`` and takes ``dur`` microseconds. A stream is numbered otherwise
than in the program, so all must answer a roll call: each by a copy of a size that no other has.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Event = dict[str, Any]
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


class Span(NamedTuple):
    """From when to when, in microseconds."""

    begin: float
    end: float


@dataclass(frozen=True)
class Overlap:
    """Of the messages to one rank: how many, and microseconds that they took, in all and while there were kernels.

    under_own: of this rank; under_any: of whichever. kernels: microseconds in which this rank had one at work.
    """

    messages: int
    travelled: float
    under_own: float
    under_any: float
    kernels: float


def overlaps(events: Sequence[Event], roll_call: Sequence[tuple[int, int]]) -> list[Overlap]:
    """Of each rank. ``roll_call``: the sizes of the copies by which its two streams answer, of hops and of messages."""
    device = [event for event in events if event.get("cat") in ON_DEVICE]
    answers = {size: _answer(device, size) for size in itertools.chain(*roll_call)}
    work = [event for event in device if event not in answers.values()]
    kernels, messages = [], []
    for hops_size, messages_size in roll_call:
        on_hops = _on(work, _stream(answers[hops_size]))
        kernels.append(merged(_span(event) for event in on_hops if event["cat"] == "kernel"))
        messages.append([_span(event) for event in _on(work, _stream(answers[messages_size]))])
    anyone = merged(itertools.chain(*kernels))
    return [_overlap(sent, own, anyone) for sent, own in zip(messages, kernels)]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The time that some of them cover, as spans that do not touch, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1].end:
            found[-1] = Span(found[-1].begin, max(found[-1].end, end))
        else:
            found.append(Span(begin, end))
    return found


def _overlap(sent: list[Span], own: list[Span], anyone: list[Span]) -> Overlap:
    under_own, under_any = (sum(_within(span, cover) for span in sent) for cover in (own, anyone))
    return Overlap(len(sent), _length(sent), under_own, under_any, _length(own))


def _within(span: Span, cover: Sequence[Span]) -> float:
    return sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for begin, end in cover)


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _answer(device: list[Event], size: int) -> Event:
    """The last copy of ``size`` bytes within the device: the roll is called when all else is done."""
    copies = [
        event for event in device if "DtoD" in event["name"] and event["args"].get("bytes") == size
    ]
    if not copies:
        raise ValueError(f"no copy of {size} bytes in the trace")
    return max(copies, key=lambda event: event["ts"])


def _on(events: list[Event], stream: int) -> Iterator[Event]:
    return (event for event in events if _stream(event) == stream)


def _stream(event: Event) -> int:
    return event["args"]["stream"]


def _span(event: Event) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"])
