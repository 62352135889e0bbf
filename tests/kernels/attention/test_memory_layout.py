"""The memory layout that a kernel is fastest with: equal tensors, in another order of memory."""

import pytest
import torch

from megatron_ring.kernels.attention import stack_to_kernel_layout, to_kernel_layout

X_BLHD, Y_BLHD = torch.randn(2, 2, 5, 3, 4).unbind()


def is_heads_first(x: torch.Tensor) -> bool:
    """Return whether the tokens of each head are contiguous in memory."""
    return x.transpose(-3, -2).is_contiguous()


def test_for_the_cpu_kernel_each_heads_tokens_are_contiguous():
    x = to_kernel_layout("sdpa", X_BLHD)
    stacked = stack_to_kernel_layout("sdpa", [X_BLHD, Y_BLHD])
    assert is_heads_first(x)
    assert is_heads_first(stacked)
    assert torch.equal(x, X_BLHD)
    assert torch.equal(stacked, torch.stack([X_BLHD, Y_BLHD]))


def test_a_tensor_in_this_layout_is_not_copied():
    once = to_kernel_layout("sdpa", X_BLHD)
    assert to_kernel_layout("sdpa", once).data_ptr() == once.data_ptr()


@pytest.mark.parametrize("kernel", ["reference", "triton", "flash", "cudnn"])
def test_a_kernel_without_a_preference_gets_the_tensor_unchanged(kernel):
    assert to_kernel_layout(kernel, X_BLHD) is X_BLHD
    assert stack_to_kernel_layout(kernel, [X_BLHD, Y_BLHD]).is_contiguous()


def test_the_preference_is_of_one_device_type():
    on_meta = X_BLHD.to("meta")
    assert to_kernel_layout("sdpa", on_meta) is on_meta


def test_gradients_pass_through():
    x = X_BLHD.clone().requires_grad_()
    (to_kernel_layout("sdpa", x) * Y_BLHD).sum().backward()
    assert torch.equal(x.grad, Y_BLHD)
