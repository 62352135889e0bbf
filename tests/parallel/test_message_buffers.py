"""Message buffers: tensors travel as bytes bit for bit, and receive buffers are reused safely."""

import itertools

import pytest
import torch

from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from megatron_ring.parallel.message_buffers import (
    RecvBufferPool,
    pack_bytes,
    storage_order_view,
    unpack_bytes,
)
from tests.tolerances import TOLERANCE

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def query_side(dtype: torch.dtype, length: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    """Return q, dout, lse and delta of two samples, which travel with the queries."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, head_dim)] * 2 + [(2, heads, length)] * 2
    dtypes = [dtype] * 2 + [accumulation_dtype(dtype)] * 2
    return [torch.randn(shape, generator=generator).to(each) for shape, each in zip(shapes, dtypes)]


@each_dtype
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (16, 4, 8)], ids=str)
def test_tensors_of_several_types_travel_as_one_message(sizes, dtype):
    tensors = query_side(dtype, *sizes)
    message = pack_bytes(tensors)
    assert message.dtype == torch.uint8
    assert message.is_contiguous()
    assert len(message) == sum(x.numel() * x.itemsize for x in tensors)
    for sent, received in zip(tensors, unpack_bytes(message, tensors)):
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)


def test_unpacking_does_not_copy():
    tensors = query_side(torch.bfloat16, 5, 3, 7)
    message = pack_bytes(tensors)
    storages = {x.untyped_storage().data_ptr() for x in unpack_bytes(message, tensors)}
    assert storages == {message.untyped_storage().data_ptr()}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_dense_tensor_keeps_its_order_in_memory(order):
    dense = torch.arange(24.0).view(2, 3, 4).permute(order)
    (received,) = unpack_bytes(pack_bytes([dense]), [dense])
    assert torch.equal(received, dense)
    assert received.stride() == dense.stride()
    assert torch.equal(storage_order_view(dense), torch.arange(24.0))


def test_a_view_with_gaps_is_packed_without_them():
    with_gaps = torch.arange(24.0).view(2, 3, 4)[:, :, 1:3]
    (received,) = unpack_bytes(pack_bytes([with_gaps]), [with_gaps])
    assert torch.equal(received, with_gaps)
    assert received.is_contiguous()


def test_a_buffer_is_reused_only_after_its_release_and_for_the_same_form():
    pool = RecvBufferPool()
    foreign = torch.zeros(3)
    first = pool.acquire(foreign)
    pool.release(foreign)
    assert pool.acquire(foreign) is not foreign, "a foreign tensor does not enter the pool"
    pool.release(first)
    pool.release(first)
    assert pool.acquire(torch.zeros(4)) is not first
    assert pool.acquire(torch.zeros(3, dtype=torch.int32)) is not first
    assert pool.acquire(foreign) is first
    assert pool.acquire(foreign) is not first, "it is in use, although it was released twice"
