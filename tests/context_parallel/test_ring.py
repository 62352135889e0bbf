from typing import NamedTuple

import pytest
import torch

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.kernels.attention import KERNELS, reference
from tests import oracle, simulated_ring
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance

# layout and stripe size, and shard lengths it can take: one token, odd ones, and around the kernels' tile of 128
LENGTHS = {
    ("ring", 1): (1, 2, 7, 33, 129, 130),
    ("striped", 1): (1, 2, 7, 33, 129, 130),
    ("striped", 3): (3, 21, 33, 129),
    ("striped", 16): (16, 112, 144),
    ("zigzag", 1): (2, 14, 34, 130, 258),
}

each_layout = pytest.mark.parametrize(("layout", "stripe"), LENGTHS)
each_kernel = pytest.mark.parametrize("kernel", FAST_KERNELS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def mistakes(
    layout: str, stripe: int, ring_size: int, length: int, kernel: str, inputs: list[torch.Tensor]
):
    """What differs from the oracle: output, log-sum-exp and gradients of a ring whose ranks hold ``length`` tokens."""
    run = simulated_ring.run(
        Layout(layout, ring_size * length, ring_size, stripe), KERNELS[kernel], *inputs
    )
    return beyond_tolerance(run.results, oracle.attention(*inputs), inputs[0].dtype)


@each_dtype
@each_kernel
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
@each_layout
def test_a_ring_is_attention_over_the_whole_sequence(layout, stripe, ring_size, kernel, dtype):
    inputs = oracle.random_inputs(2, ring_size * 48, heads=4, groups=2, dtype=dtype)
    assert mistakes(layout, stripe, ring_size, 48, kernel, inputs) == {}


@each_kernel
@pytest.mark.parametrize(
    ("layout", "stripe", "length"),
    [(*layout, length) for layout in LENGTHS for length in LENGTHS[layout]],
)
def test_every_shard_length(layout, stripe, length, kernel):
    inputs = oracle.random_inputs(1, 3 * length, heads=2, groups=1)
    assert mistakes(layout, stripe, 3, length, kernel, inputs) == {}


@each_dtype
@each_kernel
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_grouped_heads_and_batches(groups, batch, kernel, dtype):
    inputs = oracle.random_inputs(batch, 2 * 33, heads=4, groups=groups, dtype=dtype)
    assert mistakes("striped", 1, 2, 33, kernel, inputs) == {}


@each_kernel
@pytest.mark.parametrize(
    ("layout", "stripe"), [("ring", 1), ("striped", 1), ("striped", 3), ("zigzag", 1)]
)
def test_eight_ranks(layout, stripe, kernel):
    inputs = oracle.random_inputs(1, 8 * 18, heads=2, groups=2, dtype=torch.float32)
    assert mistakes(layout, stripe, 8, 18, kernel, inputs) == {}


# Equal heads send the queries back, grouped ones the keys.
each_way = pytest.mark.parametrize("groups", [2, 1], ids=["queries", "keys"])


def exchanged(layout: Layout, mask: Mask, groups: int) -> tuple[list[int], list[int]]:
    """How many exchanges each rank started, forward and backward."""
    inputs = oracle.random_inputs(mask.samples, layout.seq_length, heads=2, groups=groups)
    exchanges = simulated_ring.run(layout, reference, *inputs, mask=mask).exchanges
    return [len(sent) for sent in exchanges.forward], [len(sent) for sent in exchanges.backward]


@each_way
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 8])
def test_what_travels_goes_around_once_and_its_sums_come_home(ring_size, groups):
    """R - 1 exchanges forward; R - 1 backward, and as many of the gradients of what travels."""
    around, layout = ring_size - 1, Layout("zigzag", 2 * ring_size, ring_size)
    assert exchanged(layout, CAUSAL, groups) == ([around] * ring_size, [2 * around] * ring_size)


# of four ranks with six tokens each, window and documents, and how often keys meet queries
HOPS_OF_A_CONTIGUOUS_RING = [
    (Mask(), 4),
    *(
        (Mask(window), hops)
        for window, hops in {1: 1, 2: 2, 7: 2, 8: 3, 13: 3, 14: 4, 24: 4, 100: 4}.items()
    ),
    (Mask(0, tuple(range(24))), 1),
    (Mask(0, (0, 7, 14, 21)), 2),
    (Mask(0, (0, 8, 16)), 3),
    (Mask(0, (0, 1, 2)), 4),
    (Mask(7, (0, 1, 2)), 2),
    (Mask(0, (0, 7, 14, 21, 24, 31, 38, 45), samples=2), 2),
]


@each_way
@pytest.mark.parametrize(("mask", "hops"), HOPS_OF_A_CONTIGUOUS_RING, ids=str)
def test_a_contiguous_ring_is_cut_where_nobody_looks_further(mask, hops, groups):
    """One exchange less than hops forward; backward as many again, and as many of sums, the last of them home."""
    around = hops - 1
    assert exchanged(Layout("ring", 24, 4), mask, groups) == ([around] * 4, [2 * around] * 4)


@each_way
@pytest.mark.parametrize(
    "mask", [Mask(2), Mask(0, tuple(range(24)))], ids=["a window", "documents"]
)
@pytest.mark.parametrize(("name", "stripe"), [("striped", 1), ("striped", 3), ("zigzag", 1)])
def test_the_other_layouts_go_all_the_way_around(name, stripe, mask, groups):
    assert exchanged(Layout(name, 24, 4, stripe), mask, groups) == ([3] * 4, [6] * 4)


@each_dtype
@each_kernel
@each_layout
def test_a_ring_repeats_itself_bit_for_bit(layout, stripe, kernel, dtype):
    inputs = oracle.random_inputs(1, 3 * 48, heads=4, groups=2, dtype=dtype)
    first, again = (
        simulated_ring.run(Layout(layout, 3 * 48, 3, stripe), KERNELS[kernel], *inputs)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first.results, again.results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_the_error_does_not_grow_with_the_ring(kernel, dtype):
    """Sums stay in float32 from hop to hop: eight merges leave no more rounding in the output than one block does."""
    inputs = oracle.random_inputs(1, 8 * 24, heads=4, groups=4, dtype=dtype)
    expected = oracle.attention(*inputs).out

    def typical_error(ring_size: int) -> float:
        out = simulated_ring.run(
            Layout("striped", 8 * 24, ring_size), KERNELS[kernel], *inputs
        ).results.out
        return (out.double() - expected).square().mean().sqrt().item()

    assert typical_error(8) < 1.5 * typical_error(1)


def error_of_dq(kernel: str, ring_size: int, travels: str, inputs, dlse=None) -> float:
    """Relative to the norm of dq."""
    layout = Layout("striped" if ring_size > 1 else "none", inputs[0].shape[1], ring_size)
    settings = {"dlse_BHS": dlse, "sends_queries": lambda q, kv: travels == "queries"}
    found = simulated_ring.run(layout, KERNELS[kernel], *inputs, **settings).results.dq
    expected = oracle.attention(*inputs, dlse_BHS=dlse).dq
    return float((found.double() - expected).norm() / expected.norm())


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lse_read", [False, True], ids=["output", "output and lse"])
@pytest.mark.parametrize("travels", ["queries", "keys"])
def test_equal_gradients_of_positive_inputs_do_not_add_up_errors(travels, lse_read, dtype, kernel):
    """There an error of delta is the same for all keys, and they do not cancel it out.

    Compared with one process that computes in float32 from an output that is rounded once.
    """
    inputs = oracle.random_inputs(1, 192, heads=2, groups=2, head_size=64)
    inputs = [*(x.abs().to(dtype) for x in inputs[:3]), torch.ones_like(inputs[3], dtype=dtype)]
    dlse = 0.1 * oracle.random_dlse(inputs[0]) if lse_read else None
    alone = error_of_dq("reference", 1, travels, inputs)
    for ring_size in (1, 4):
        assert error_of_dq(kernel, ring_size, travels, inputs, dlse) <= 2.5 * alone


@each_kernel
def test_the_output_is_in_the_type_of_the_queries_and_the_sums_in_float32(kernel):
    inputs = oracle.random_inputs(1, 4, heads=2, groups=1, dtype=torch.bfloat16)
    results = simulated_ring.run(Layout("striped", 4, 2), KERNELS[kernel], *inputs).results
    assert results.out.dtype == torch.bfloat16
    assert {results.lse.dtype, results.dq.dtype, results.dk.dtype, results.dv.dtype} == {
        torch.float32
    }


def test_a_rank_that_fails_is_heard_of_and_nobody_waits_for_it():
    class OutOfMemory:
        """Rank 0 fails in the second hop, with a transfer yet to start."""

        def forward(self, q_BLHD, k_BLGD, v_BLGD, runs, scale, state):
            if runs.visible_pairs == 0:
                raise MemoryError

    with pytest.raises(MemoryError):
        simulated_ring.run(
            Layout("ring", 8, 4), OutOfMemory(), *oracle.random_inputs(1, 8, heads=1, groups=1)
        )


class Diary:
    """An exchange that keeps what it is given, and a kernel that computes nothing: what they were asked, in order."""

    def __init__(self):
        self.events: list[str] = []

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "Sent":
        number = sum(event.startswith("start") for event in self.events)
        self.events.append(f"start {number}")
        return Sent(tensor, f"wait {number}", self.events)

    def backward(self, dout_BLHD, *tensors) -> None:
        self.events.append(f"compute {dout_BLHD.shape[2]} heads")


class Sent(NamedTuple):
    tensor: torch.Tensor
    event: str
    events: list[str]

    def wait(self) -> torch.Tensor:
        self.events.append(self.event)
        return self.tensor


HALF, ALL = "compute 2 heads", "compute 4 heads"


@pytest.mark.parametrize("groups", [4, 2], ids=["queries", "keys"])
def test_backward_computes_while_anything_travels_home_included(groups):
    """Of the work on own keys half comes first, beside the first message, and half last, beside the last sums. The sums
    of the first hop have nowhere to go: they are a rank's own."""
    diary, layout = Diary(), Layout("striped", 12, 3)
    q, kv, lse = torch.ones(1, 4, 4, 8), torch.ones(2, 1, 4, groups, 8), torch.zeros(1, 4, 4)
    ring_loop.backward(q, None, q, kv, q, lse, ring_loop.Ring(layout, 0, diary, 1.0, diary))
    hops = (
        ["start 0", HALF, "wait 0"],
        ["start 1", ALL, "start 2", "wait 1"],
        [ALL, "wait 2", "start 3"],
    )
    assert diary.events == [*hops[0], *hops[1], *hops[2], HALF, "wait 3"]


@pytest.mark.parametrize("groups", [4, 2], ids=["queries", "keys"])
def test_where_messages_are_quick_the_own_keys_are_met_at_once(groups):
    diary, layout = Diary(), Layout("striped", 8, 2)
    q, kv, lse = torch.ones(1, 4, 4, 8), torch.ones(2, 1, 4, groups, 8), torch.zeros(1, 4, 4)
    ring = ring_loop.Ring(layout, 0, diary, 1.0, diary, in_halves=False)
    ring_loop.backward(q, None, q, kv, q, lse, ring)
    assert diary.events == ["start 0", ALL, "wait 0", ALL, "start 1", "wait 1"]
