"""What kernels are faster with: the same numbers, in another order of memory."""

import pytest
import torch

from megatron_ring.kernels.attention import arranged, stacked

X_BLHD, Y_BLHD = torch.randn(2, 2, 5, 3, 4).unbind()


def heads_first(x: torch.Tensor) -> bool:
    """Whether a head's tokens lie together in memory."""
    return x.transpose(-3, -2).is_contiguous()


def test_the_cpu_kernel_has_each_heads_tokens_together():
    for arranged_x in (arranged("sdpa", X_BLHD), stacked("sdpa", [X_BLHD, Y_BLHD])):
        assert heads_first(arranged_x)
    assert torch.equal(arranged("sdpa", X_BLHD), X_BLHD)
    assert torch.equal(stacked("sdpa", [X_BLHD, Y_BLHD]), torch.stack([X_BLHD, Y_BLHD]))


def test_what_lies_so_already_is_not_copied():
    once = arranged("sdpa", X_BLHD)
    assert arranged("sdpa", once).data_ptr() == once.data_ptr()


@pytest.mark.parametrize("kernel", ["reference", "triton", "flash", "cudnn"])
def test_a_kernel_without_a_preference_has_it_as_it_is(kernel):
    assert arranged(kernel, X_BLHD) is X_BLHD
    assert stacked(kernel, [X_BLHD, Y_BLHD]).is_contiguous()


def test_on_another_device_nothing_is_known_of_the_kernel():
    elsewhere = X_BLHD.to("meta")
    assert arranged("sdpa", elsewhere) is elsewhere


def test_gradients_pass_through():
    x = X_BLHD.clone().requires_grad_()
    (arranged("sdpa", x) * Y_BLHD).sum().backward()
    assert torch.equal(x.grad, Y_BLHD)
