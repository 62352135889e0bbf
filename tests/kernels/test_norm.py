"""The norms against their formulas in float64."""

import pytest
import torch

from megatron_ring.kernels.norm import norm


def rms_norm(x, weight, bias):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def layer_norm(x, weight, bias):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


FORMULAS = {"RMSNorm": rms_norm, "LayerNorm": layer_norm}


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def trained(name, size):
    """Create a module whose parameters are not their initial ones and zeros."""
    module = norm(name, size, 1e-5)
    for parameter in module.parameters():
        parameter.data = 1 + 0.3 * normal(size)
    return module


def expected(name, module, x):
    bias = module.bias.double() if name == "LayerNorm" else None
    return FORMULAS[name](x.double(), module.weight.double(), bias)


@pytest.mark.parametrize("name", FORMULAS)
def test_float32_matches_the_formula(name):
    module, x_BlE = trained(name, 96), 5 * normal(2, 3, 96) + 1
    torch.testing.assert_close(
        module(x_BlE).double(), expected(name, module, x_BlE), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_is_rounded_once(name):
    """With an intermediate rounding, results would differ from the rounded formula by a bit."""
    module = trained(name, 96).bfloat16()
    x_BlE = (5 * normal(20, 30, 96) + 1).bfloat16()
    different = module(x_BlE) != expected(name, module, x_BlE).bfloat16()
    assert different.double().mean() < 1e-4


@pytest.mark.parametrize(
    ("name", "parameters"), [("RMSNorm", ["weight"]), ("LayerNorm", ["weight", "bias"])]
)
def test_only_layer_norm_has_a_bias(name, parameters):
    assert [key for key, _ in norm(name, 8, 1e-5).named_parameters()] == parameters
