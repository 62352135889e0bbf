"""Traces made by hand, whose overlap is known."""

import pytest

from benchmarks.device_trace import Overlap, Span, merged, overlaps

# Two ranks: the streams of their hops and of their messages, and the sizes by which these answer.
STREAMS, ROLL_CALL = [(7, 20), (13, 24)], [(1, 2), (3, 4)]


def kernel(rank: int, begin: float, end: float) -> dict:
    return on_device("kernel", "forward_hop", STREAMS[rank][0], begin, end)


def message(
    rank: int, begin: float, end: float, name: str = "Memcpy DtoD (Device -> Device)"
) -> dict:
    return on_device("gpu_memcpy", name, STREAMS[rank][1], begin, end, bytes=1 << 20)


def on_device(cat: str, name: str, stream: int, begin: float, end: float, **args) -> dict:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "args": {"stream": stream, **args},
    }


def answer(size: int, begin: float) -> dict:
    stream = [stream for pair in STREAMS for stream in pair][size - 1]
    return on_device(
        "gpu_memcpy", "Memcpy DtoD (Device -> Device)", stream, begin, begin + 1, bytes=size
    )


def found(*events: dict) -> list[Overlap]:
    """Between what else a trace has: what runs on the host, and the roll call at the end."""
    host = {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": 0,
        "dur": 1000,
        "args": {},
    }
    return overlaps(
        [host, *events, *(answer(size, 900 + size) for size in (1, 2, 3, 4))], ROLL_CALL
    )


NOTHING = Overlap(0, 0, 0, 0, 0)


def test_none():
    assert found(kernel(0, 0, 10), message(0, 10, 15)) == [Overlap(1, 5, 0, 0, 10), NOTHING]


def test_full():
    assert found(kernel(0, 0, 10), message(0, 2, 7)) == [Overlap(1, 5, 5, 5, 10), NOTHING]


@pytest.mark.parametrize(
    ("begin", "end", "under"), [(-3, 4, 4), (8, 20, 2), (-5, 15, 10), (9.5, 10.5, 0.5)]
)
def test_partial(begin, end, under):
    assert found(kernel(0, 0, 10), message(0, begin, end)) == [
        Overlap(1, end - begin, under, under, 10),
        NOTHING,
    ]


def test_under_several_kernels_and_the_gaps_between_them():
    events = kernel(0, 0, 4), kernel(0, 4, 6), kernel(0, 8, 9)
    assert found(*events, message(0, 3, 10)) == [Overlap(1, 7, 4, 4, 7), NOTHING]


def test_several_messages_are_added_up_and_kernels_side_by_side_count_once():
    events = kernel(0, 0, 10), kernel(0, 5, 12)
    assert found(*events, message(0, 6, 8), message(0, 11, 14)) == [
        Overlap(2, 5, 3, 3, 12),
        NOTHING,
    ]


def test_another_rank_s_kernels_are_told_apart():
    assert found(kernel(1, 0, 10), message(0, 5, 12), kernel(0, 11, 20)) == [
        Overlap(1, 7, 1, 6, 9),
        Overlap(0, 0, 0, 0, 10),
    ]


def test_a_message_that_a_kernel_copies_is_a_message_and_a_copy_among_the_hops_is_no_kernel():
    copied = on_device("kernel", "direct_copy_kernel", STREAMS[0][1], 2, 6)
    bounds = on_device(
        "gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", STREAMS[0][0], 2, 6, bytes=4096
    )
    assert found(copied, bounds) == [Overlap(1, 4, 0, 0, 0), NOTHING]


def test_the_roll_is_called_last_and_other_streams_do_not_count():
    """A copy as small among the hops is not an answer, and neither is one from the host."""
    small = on_device("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 99, 1, 2, bytes=1)
    from_host = on_device("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 99, 950, 951, bytes=1)
    elsewhere = on_device("kernel", "elsewhere", 99, 0, 50)
    assert found(small, from_host, elsewhere, message(0, 2, 7)) == [Overlap(1, 5, 0, 0, 0), NOTHING]


def test_a_stream_that_does_not_answer_is_missed():
    with pytest.raises(ValueError, match="no copy of 2 bytes in the trace"):
        overlaps([answer(1, 0)], [(1, 2)])


def test_merged_spans_do_not_touch():
    assert merged([Span(5, 6), Span(0, 2), Span(1, 3), Span(3, 4), Span(0.5, 1)]) == [
        Span(0, 4),
        Span(5, 6),
    ]
