"""The activations against their formulas in float64."""

import math

import torch

from megatron_ring.kernels.activation import gelu, swiglu

X = torch.linspace(-6, 6, 101)


def test_swiglu_matches_the_formula():
    up = torch.randn(101, generator=torch.Generator().manual_seed(0))
    gate = X.double()
    torch.testing.assert_close(
        swiglu(X, up).double(), gate / (1 + (-gate).exp()) * up.double(), rtol=1e-5, atol=1e-6
    )


def test_gelu_matches_the_tanh_formula():
    x = X.double()
    expected = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(X).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_dtype_is_preserved():
    assert swiglu(X.bfloat16(), X.bfloat16()).dtype == gelu(X.bfloat16()).dtype == torch.bfloat16
