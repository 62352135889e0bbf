"""What counts as the memory an operator reads correctly, what is copied, and what is refused."""

import pytest
import torch

from megatron_ring.kernels.memory_contract import UNRESTRICTED, Memory, VendorOperator

X_BLHD = torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(0)).half()
X_BHLD = X_BLHD.transpose(1, 2)
TOKENS_HEADS_DIM = Memory(dense=(2, 1, 3))


def identity(**operands):
    return operands["x"]


def operator(memory: Memory) -> VendorOperator:
    return VendorOperator("an operator", identity, {"x": memory})


def test_dense_dimensions_may_have_any_order_and_the_others_any_stride():
    assert TOKENS_HEADS_DIM.holds_for(X_BHLD)
    assert TOKENS_HEADS_DIM.holds_for(X_BHLD[:, :, 2:4])
    assert TOKENS_HEADS_DIM.holds_for(X_BHLD.expand(2, -1, -1, -1))
    assert not TOKENS_HEADS_DIM.holds_for(X_BHLD[:, :2])
    assert not TOKENS_HEADS_DIM.holds_for(X_BHLD.contiguous())
    assert not Memory(dense=(0, 2, 1, 3)).holds_for(X_BHLD[:, :, 2:4])


def test_strides_of_single_elements_and_of_empty_tensors_do_not_matter():
    assert TOKENS_HEADS_DIM.holds_for(X_BHLD[:, :, :1])
    assert Memory(dense=(0, 1)).holds_for(torch.empty(0, 4).t())


@pytest.mark.parametrize("memory", [TOKENS_HEADS_DIM, Memory(dense=(-1,)), Memory(dense=(3, 0))])
def test_a_copy_is_equal_and_meets_the_statement(memory):
    half = X_BHLD[:, 1:3, ::2, ::2]
    copied = memory.copy(half)
    assert memory.holds_for(copied)
    assert torch.equal(copied, half)


def test_alignment_holds_for_the_address_and_the_outer_strides():
    rows = Memory(dense=(1,), alignment=16)
    x = torch.randn(4, 24).half()
    assert rows.holds_for(x[:, 8:])
    assert not rows.holds_for(x[:, 4:])
    assert not rows.holds_for(torch.randn(4, 20).half())
    assert Memory(dense=(1,), alignment=4).holds_for(torch.randn(4, 20).half())


def test_rows_are_padded_for_alignment_once_for_all_that_a_tensor_is_broadcast_over():
    bias_LM = torch.randn(3, 5).half()
    copied = Memory(dense=(3,), alignment=16).copy(bias_LM.expand(2, 4, 3, 5))
    assert torch.equal(copied, bias_LM.expand(2, 4, 3, 5))
    assert copied.stride() == (0, 0, 8, 1)


def test_a_shape_that_cannot_be_aligned_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match="16") as error:
        Memory(dense=(0, 1), alignment=16).copy(torch.randn(3, 5).half())
    assert "(3, 5)" in str(error.value)


def test_a_tensor_that_meets_the_statement_is_passed_itself_and_gradients_pass_a_copy():
    assert operator(TOKENS_HEADS_DIM)(x=X_BHLD) is X_BHLD
    x = torch.randn(4, 6, requires_grad=True)
    y = operator(Memory(dense=(0, 1)))(x=x.t())
    assert y.is_contiguous()
    y[1].sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 6).index_fill_(1, torch.tensor(1), 1))


def test_tensors_without_data_can_be_checked():
    on_meta = X_BHLD.to("meta")
    assert TOKENS_HEADS_DIM.holds_for(on_meta) == TOKENS_HEADS_DIM.holds_for(X_BHLD)
    assert operator(Memory(dense=(0, 1, 2, 3), alignment=16))(x=on_meta).is_contiguous()


def test_a_tensor_about_which_nothing_is_stated_is_refused():
    with pytest.raises(TypeError, match="mask"):
        operator(UNRESTRICTED)(x=X_BLHD, mask=X_BLHD)


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(TypeError, match=r"torch\.float16.*torch\.float32"):
        operator(Memory(dtypes=(torch.float32,)))(x=X_BLHD)


def test_a_copy_cannot_take_the_place_of_a_tensor_that_is_written_to():
    output = Memory(dense=(-1,), written=True)
    assert operator(output)(x=X_BLHD) is X_BLHD
    with pytest.raises(ValueError, match="writes to x"):
        operator(output)(x=X_BLHD.mT)
