"""What a ring sends, byte for byte, and that it is the lighter of the two."""

from fractions import Fraction

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.traffic import backward_bytes, queries_are_lighter
from megatron_ring.kernels.attention import reference
from megatron_ring.kernels.attention.state import accumulation_dtype
from tests import oracle, simulated_ring
from tests.tolerances import TOLERANCE

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@each_dtype
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("ring_size", [2, 3])
def test_as_many_bytes_are_sent_as_were_counted(ring_size, groups, dtype):
    """Forward, keys and values of the key-value heads; backward, the lighter load, and one hop behind it its sums."""
    batch, length, heads, head_size = 2, 6, 4, 16
    q, k, v, dout = oracle.random_inputs(batch, ring_size * length, heads, groups, dtype, head_size)
    sent = simulated_ring.run(
        Layout("striped", ring_size * length, ring_size), reference, q, k, v, dout
    ).exchanges
    key_values = 2 * batch * length * groups * head_size
    assert sent.forward == [[key_values * dtype.itemsize] * (ring_size - 1)] * ring_size

    numbers, way = (
        (batch * length * heads * head_size, "queries") if groups == heads else (key_values, "keys")
    )
    sums = numbers * accumulation_dtype(dtype).itemsize
    in_a_hop = backward_bytes(q[:, :length], torch.stack([k, v])[:, :, :length])
    assert in_a_hop[way] == min(in_a_hop.values())
    message = in_a_hop[way] - sums
    assert sent.backward == [[message, *[message, sums] * (ring_size - 2), sums]] * ring_size


def test_what_travels_backward_can_be_told():
    """The published ring sends keys, though its queries be lighter; the gradients are the same."""
    inputs, layout = oracle.random_inputs(2, 12, 4, 4, torch.float64, 16), Layout("striped", 12, 2)
    lighter = simulated_ring.run(layout, reference, *inputs)
    published = simulated_ring.run(layout, reference, *inputs, sends_queries=lambda q, kv: False)
    cost = backward_bytes(inputs[0][:, :6], torch.stack(inputs[1:3])[:, :, :6])
    sums = inputs[1][:, :6].nbytes * 2
    assert published.exchanges.backward == [[cost["keys"] - sums, sums]] * 2
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
def test_queries_are_lighter_below_so_many_to_a_key_value_head(dtype):
    groups, head_size = 120, 256
    break_even = int(BREAK_EVEN[dtype] * groups)
    kv = torch.empty(2, 1, 8, groups, head_size, dtype=dtype, device="meta")
    below, at = (
        torch.empty(1, 8, heads, head_size, dtype=dtype, device="meta")
        for heads in (break_even - 1, break_even)
    )
    assert queries_are_lighter(below, kv)
    assert not queries_are_lighter(at, kv)


@each_dtype
@pytest.mark.parametrize("head_size", [8, 64, 128])
def test_equal_heads_send_their_queries_and_grouped_heads_their_keys(head_size, dtype):
    q = torch.empty(1, 8, 4, head_size, dtype=dtype, device="meta")
    lighter = {
        groups: queries_are_lighter(q, q.new_empty(2, 1, 8, groups, head_size))
        for groups in (4, 2, 1)
    }
    assert lighter == {4: True, 2: False, 1: False}
