"""Handmade traces with known overlap."""

import pytest

from benchmarks.device_trace import Overlap, Span, merged, overlaps

# Two ranks: the streams of their hops and messages, and the sizes of the copies that mark these.
STREAMS = [(7, 20), (13, 24)]
MARKERS = [(1, 2), (3, 4)]
COPY = "Memcpy DtoD (Device -> Device)"
FROM_HOST = "Memcpy HtoD (Pinned -> Device)"


def kernel(rank: int, begin: float, end: float) -> dict:
    hops, _ = STREAMS[rank]
    return on_device("kernel", "forward_hop", hops, begin, end)


def message(rank: int, begin: float, end: float) -> dict:
    _, messages = STREAMS[rank]
    return on_device("gpu_memcpy", COPY, messages, begin, end, bytes=1 << 20)


def marker(size: int, begin: float) -> dict:
    streams = [stream for pair in STREAMS for stream in pair]
    return on_device("gpu_memcpy", COPY, streams[size - 1], begin, begin + 1, bytes=size)


def on_device(category: str, name: str, stream: int, begin: float, end: float, **args) -> dict:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "args": {"stream": stream, **args},
    }


def overlaps_of(*events: dict) -> list[Overlap]:
    """Return the overlaps of a trace that also has a host event and the markers at its end."""
    host = {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": 0,
        "dur": 1000,
        "args": {},
    }
    markers = [marker(size, 900 + size) for size in (1, 2, 3, 4)]
    return overlaps([host, *events, *markers], MARKERS)


NOTHING = Overlap(0, 0, 0, 0, 0)


def test_a_message_after_the_kernel_is_not_hidden():
    assert overlaps_of(kernel(0, 0, 10), message(0, 10, 15)) == [Overlap(1, 5, 0, 0, 10), NOTHING]


def test_a_message_within_the_kernel_is_hidden():
    assert overlaps_of(kernel(0, 0, 10), message(0, 2, 7)) == [Overlap(1, 5, 5, 5, 10), NOTHING]


@pytest.mark.parametrize(
    ("begin", "end", "under"), [(-3, 4, 4), (8, 20, 2), (-5, 15, 10), (9.5, 10.5, 0.5)]
)
def test_a_message_that_is_partly_within_the_kernel_is_partly_hidden(begin, end, under):
    expected = Overlap(1, end - begin, under, under, 10)
    assert overlaps_of(kernel(0, 0, 10), message(0, begin, end)) == [expected, NOTHING]


def test_gaps_between_kernels_hide_nothing():
    kernels = [kernel(0, 0, 4), kernel(0, 4, 6), kernel(0, 8, 9)]
    assert overlaps_of(*kernels, message(0, 3, 10)) == [Overlap(1, 7, 4, 4, 7), NOTHING]


def test_messages_add_up_and_concurrent_kernels_count_once():
    events = [kernel(0, 0, 10), kernel(0, 5, 12), message(0, 6, 8), message(0, 11, 14)]
    assert overlaps_of(*events) == [Overlap(2, 5, 3, 3, 12), NOTHING]


def test_kernels_of_other_ranks_are_counted_apart():
    events = [kernel(1, 0, 10), message(0, 5, 12), kernel(0, 11, 20)]
    assert overlaps_of(*events) == [Overlap(1, 7, 1, 6, 9), Overlap(0, 0, 0, 0, 10)]


def test_the_stream_decides_what_is_a_message_and_what_a_kernel():
    """A kernel on the message stream is a message; a copy on the hop stream is not a kernel."""
    hops, messages = STREAMS[0]
    copy_kernel = on_device("kernel", "direct_copy_kernel", messages, 2, 6)
    key_ranges = on_device("gpu_memcpy", FROM_HOST, hops, 2, 6, bytes=4096)
    assert overlaps_of(copy_kernel, key_ranges) == [Overlap(1, 4, 0, 0, 0), NOTHING]


def test_only_the_last_copy_within_the_device_is_a_marker_and_other_streams_do_not_count():
    small = on_device("gpu_memcpy", COPY, 99, 1, 2, bytes=1)
    from_host = on_device("gpu_memcpy", FROM_HOST, 99, 950, 951, bytes=1)
    elsewhere = on_device("kernel", "elsewhere", 99, 0, 50)
    expected = [Overlap(1, 5, 0, 0, 0), NOTHING]
    assert overlaps_of(small, from_host, elsewhere, message(0, 2, 7)) == expected


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="no copy of 2 bytes in the trace"):
        overlaps([marker(1, 0)], [(1, 2)])


def test_merged_spans_are_disjoint_and_ordered():
    spans = [Span(5, 6), Span(0, 2), Span(1, 3), Span(3, 4), Span(0.5, 1)]
    assert merged(spans) == [Span(0, 4), Span(5, 6)]
