"""What kernels are faster with: the same numbers, in another order of memory."""

import pytest
import torch

from megatron_ring.kernels.attention import stack_to_kernel_layout, to_kernel_layout

X_BLHD, Y_BLHD = torch.randn(2, 2, 5, 3, 4).unbind()


def heads_first(x: torch.Tensor) -> bool:
    """Whether a head's tokens lie together in memory."""
    return x.transpose(-3, -2).is_contiguous()


def test_the_cpu_kernel_has_each_heads_tokens_together():
    for arranged_x in (
        to_kernel_layout("sdpa", X_BLHD),
        stack_to_kernel_layout("sdpa", [X_BLHD, Y_BLHD]),
    ):
        assert heads_first(arranged_x)
    assert torch.equal(to_kernel_layout("sdpa", X_BLHD), X_BLHD)
    assert torch.equal(
        stack_to_kernel_layout("sdpa", [X_BLHD, Y_BLHD]), torch.stack([X_BLHD, Y_BLHD])
    )


def test_what_lies_so_already_is_not_copied():
    once = to_kernel_layout("sdpa", X_BLHD)
    assert to_kernel_layout("sdpa", once).data_ptr() == once.data_ptr()


@pytest.mark.parametrize("kernel", ["reference", "triton", "flash", "cudnn"])
def test_a_kernel_without_a_preference_has_it_as_it_is(kernel):
    assert to_kernel_layout(kernel, X_BLHD) is X_BLHD
    assert stack_to_kernel_layout(kernel, [X_BLHD, Y_BLHD]).is_contiguous()


def test_on_another_device_nothing_is_known_of_the_kernel():
    elsewhere = X_BLHD.to("meta")
    assert to_kernel_layout("sdpa", elsewhere) is elsewhere


def test_gradients_pass_through():
    x = X_BLHD.clone().requires_grad_()
    (to_kernel_layout("sdpa", x) * Y_BLHD).sum().backward()
    assert torch.equal(x.grad, Y_BLHD)
