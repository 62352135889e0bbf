"""The bytes that a ring sends are as counted, and the lighter of keys and queries travels."""

from fractions import Fraction

import pytest
import torch

from megatron_ring.context_parallel.hop_cost import backward_bytes, queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import reference
from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from tests import oracle, simulated_ring
from tests.tolerances import TOLERANCE

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@each_dtype
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("ring_size", [2, 3])
def test_a_ring_sends_as_many_bytes_as_counted(ring_size, groups, dtype):
    """Forward: keys and values. Backward: the lighter side, and one hop later its accumulators."""
    batch, length, heads, head_dim = 2, 6, 4, 16
    q, k, v, dout = oracle.random_inputs(batch, ring_size * length, heads, groups, dtype, head_dim)
    layout = Layout("striped", ring_size * length, ring_size)
    sent = simulated_ring.run(layout, reference, q, k, v, dout).exchanges
    kv_elements = 2 * batch * length * groups * head_dim
    assert sent.forward == [[kv_elements * dtype.itemsize] * (ring_size - 1)] * ring_size

    if groups == heads:
        traveller = "queries"
        elements = batch * length * heads * head_dim
    else:
        traveller = "keys"
        elements = kv_elements
    accumulators = elements * accumulation_dtype(dtype).itemsize
    bytes_per_hop = backward_bytes(q[:, :length], torch.stack([k, v])[:, :, :length])
    assert bytes_per_hop[traveller] == min(bytes_per_hop.values())
    message = bytes_per_hop[traveller] - accumulators
    of_rank = [message, *[message, accumulators] * (ring_size - 2), accumulators]
    assert sent.backward == [of_rank] * ring_size


def test_sends_queries_overrides_the_choice_with_the_same_gradients():
    """The published ring always sends the keys, even if its queries are lighter."""
    inputs = oracle.random_inputs(2, 12, 4, 4, torch.float64, 16)
    layout = Layout("striped", 12, 2)
    lighter = simulated_ring.run(layout, reference, *inputs)
    published = simulated_ring.run(layout, reference, *inputs, sends_queries=lambda q, kv: False)
    bytes_per_hop = backward_bytes(inputs[0][:, :6], torch.stack(inputs[1:3])[:, :, :6])
    accumulators = inputs[1][:, :6].nbytes * 2
    of_rank = [bytes_per_hop["keys"] - accumulators, accumulators]
    assert published.exchanges.backward == [of_rank] * 2
    assert sum(lighter.exchanges.backward[0]) < sum(published.exchanges.backward[0])
    for ours, theirs in zip(lighter.results, published.results):
        torch.testing.assert_close(ours, theirs)


BREAK_EVEN = {
    torch.float64: Fraction(4, 3),
    torch.float32: Fraction(4, 3),
    torch.bfloat16: Fraction(3, 2),
    torch.float16: Fraction(3, 2),
}


@pytest.mark.parametrize("dtype", BREAK_EVEN, ids=str)
def test_queries_are_lighter_below_the_break_even_of_heads_per_group(dtype):
    groups, head_dim = 120, 256
    break_even = int(BREAK_EVEN[dtype] * groups)
    kv = torch.empty(2, 1, 8, groups, head_dim, dtype=dtype, device="meta")
    below, at = (
        torch.empty(1, 8, heads, head_dim, dtype=dtype, device="meta")
        for heads in (break_even - 1, break_even)
    )
    assert queries_are_lighter(below, kv)
    assert not queries_are_lighter(at, kv)


@each_dtype
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_equal_heads_send_their_queries_and_grouped_heads_their_keys(head_dim, dtype):
    q = torch.empty(1, 8, 4, head_dim, dtype=dtype, device="meta")
    lighter = {
        groups: queries_are_lighter(q, q.new_empty(2, 1, 8, groups, head_dim))
        for groups in (4, 2, 1)
    }
    assert lighter == {4: True, 2: False, 1: False}
