"""The emulated ring computes the same attention as the float64 oracle."""

import pytest

from benchmarks.emulated_ring import attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.kernels.attention import reference
from tests import oracle
from tests.tolerances import error

PACK = oracle.documents(1, 48, (13, 1, 2, 30))
MASKS = {
    "causal": (Mask(), None),
    "documents": (Mask(document_starts=(0, 13, 14, 16, 46)), oracle.visible(PACK)),
}


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("layout", ["ring", "striped", "zigzag"])
def test_emulated_ring_equals_the_oracle(layout, mask_name):
    mask, visible = MASKS[mask_name]
    inputs = oracle.random_inputs(1, 48, 4, 2)
    actual = attention(inputs, Layout(layout, 48, 4), reference, mask)
    expected = oracle.attention(*inputs, visible)
    for name in actual._fields:
        assert error(getattr(actual, name), getattr(expected, name)) < 1e-12
