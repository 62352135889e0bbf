"""The feed-forward layers and their widths and biases."""

from dataclasses import replace

import torch

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.activation import gelu, swiglu
from megatron_ring.model.initialization import initialize
from megatron_ring.model.mlp import mlp


def initialized(config: ModelConfig) -> torch.nn.Module:
    layer = mlp(config)
    initialize(layer, config, seed=1, prefix="blocks.0.mlp")
    return layer


def test_swiglu_gates_one_projection_by_another(llama):
    layer, x_BlE = initialized(llama), torch.randn(2, 3, 32)
    gate_BlF, up_BlF = x_BlE @ layer.gate_proj.weight.T, x_BlE @ layer.up_proj.weight.T
    torch.testing.assert_close(layer(x_BlE), swiglu(gate_BlF, up_BlF) @ layer.down_proj.weight.T)


def test_gelu_has_one_projection_up(llama):
    layer, x_BlE = initialized(replace(llama, activation="gelu")), torch.randn(2, 3, 32)
    torch.testing.assert_close(
        layer(x_BlE), gelu(x_BlE @ layer.up_proj.weight.T) @ layer.down_proj.weight.T
    )


def test_the_width_is_that_of_the_config(config):
    assert mlp(config).up_proj.weight.shape == (config.feed_forward_size, config.hidden_size)
    assert mlp(replace(config, ffn_hidden_size=40)).up_proj.weight.shape == (40, config.hidden_size)


def test_layers_have_biases_if_the_config_has_them(config):
    assert all(
        (layer.bias is not None) == config.add_bias_linear for layer in mlp(config).children()
    )
