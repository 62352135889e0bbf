"""Tensors as messages, byte for byte."""

import itertools

import pytest
import torch

from megatron_ring.kernels.attention.state import accumulation_dtype
from megatron_ring.parallel.messages import in_memory, packed, unpacked
from tests.tolerances import TOLERANCE

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def rows_of_heads(
    dtype: torch.dtype, length: int, heads: int, head_size: int
) -> list[torch.Tensor]:
    """q, dout, lse and delta of two samples: what the queries carry."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, head_size)] * 2 + [(2, heads, length)] * 2
    types = [dtype] * 2 + [accumulation_dtype(dtype)] * 2
    return [torch.randn(shape, generator=generator).to(each) for shape, each in zip(shapes, types)]


@each_dtype
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (16, 4, 8)], ids=str)
def test_tensors_of_several_types_travel_as_one_message(sizes, dtype):
    rows = rows_of_heads(dtype, *sizes)
    message = packed(rows)
    assert message.dtype == torch.uint8
    assert message.is_contiguous()
    assert len(message) == sum(x.numel() * x.itemsize for x in rows)
    for sent, received in zip(rows, unpacked(message, rows)):
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)


def test_what_was_received_is_not_copied():
    rows = rows_of_heads(torch.bfloat16, 5, 3, 7)
    message = packed(rows)
    assert {x.untyped_storage().data_ptr() for x in unpacked(message, rows)} == {
        message.untyped_storage().data_ptr()
    }


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_dense_tensor_keeps_its_order_in_memory(order):
    dense = torch.arange(24.0).view(2, 3, 4).permute(order)
    (received,) = unpacked(packed([dense]), [dense])
    assert torch.equal(received, dense)
    assert received.stride() == dense.stride()
    assert torch.equal(in_memory(dense), torch.arange(24.0))


def test_a_view_with_gaps_is_packed_without_them():
    holes = torch.arange(24.0).view(2, 3, 4)[:, :, 1:3]
    (received,) = unpacked(packed([holes]), [holes])
    assert torch.equal(received, holes)
    assert received.is_contiguous()
