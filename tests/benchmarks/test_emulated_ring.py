"""A ring whose ranks are emulated computes what attention is."""

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


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["ring", "striped", "zigzag"])
def test_it_is_attention(layout, mask):
    inputs, (given, visible) = oracle.random_inputs(1, 48, 4, 2), MASKS[mask]
    found, expected = (
        attention(inputs, Layout(layout, 48, 4), reference, given),
        oracle.attention(*inputs, visible),
    )
    assert all(
        error(getattr(found, name), getattr(expected, name)) < 1e-12 for name in found._fields
    )
