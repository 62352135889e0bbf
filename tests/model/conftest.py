"""Two small models, one like Llama and one like GPT-2, and the attention of one process that holds every token."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_ring.config import ModelConfig
from megatron_ring.model.attention import AttentionFunction
from megatron_ring.model.gpt import GPT

VOCABULARY, LENGTH = 48, 16

CONFIGS = {
    "llama": ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2),
    "gpt2": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
    ),
}


def causal_attention(q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, v_BlGD: torch.Tensor) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q_BlHD, k_BlGD, v_BlGD))
    return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def attention() -> AttentionFunction:
    return causal_attention


@pytest.fixture
def build() -> Callable[..., GPT]:
    def build(config: ModelConfig, attention: AttentionFunction = causal_attention, seed: int = 1) -> GPT:
        return GPT(config, VOCABULARY, LENGTH, attention, seed)

    return build


@pytest.fixture
def llama() -> ModelConfig:
    return CONFIGS["llama"]


@pytest.fixture
def tokens_BS() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH))


@pytest.fixture
def positions_S() -> torch.Tensor:
    return torch.arange(LENGTH)
