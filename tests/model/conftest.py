"""Small models like Llama, GPT-2, gpt-oss and Qwen, and attention of a single process."""

from collections.abc import Callable

import pytest
import torch

from megatron_ring.config import ModelConfig
from megatron_ring.model import initialization
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
    "gpt-oss": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        window_size=6,
        window_attn_skip_freq=2,
        softmax_type="learnable",
    ),
    # Qwen 3's head norms with heads that are together wider than the stream, and Qwen 2's biases.
    "qwen": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        qk_layernorm=True,
        add_qkv_bias=True,
    ),
}


def plain_attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    window: int = 0,
    document_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement the protocol of attention functions with a dense mask; in float32 for bfloat16."""
    dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    q_BHSD, k_BGSD, v_BGSD = (x.transpose(1, 2).to(dtype) for x in (q_BSHD, k_BSGD, v_BSGD))
    repeats = q_BHSD.shape[1] // k_BGSD.shape[1]
    k_BHSD, v_BHSD = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSD, v_BGSD))
    hidden_BSS = ~visible(*q_BSHD.shape[:2], window, document_starts)
    scores_BHSS = (q_BHSD @ k_BHSD.mT / q_BHSD.shape[-1] ** 0.5).masked_fill(
        hidden_BSS[:, None], -torch.inf
    )
    out_BHSD = scores_BHSS.softmax(-1) @ v_BHSD
    return out_BHSD.transpose(1, 2).type_as(q_BSHD), scores_BHSS.logsumexp(-1)


def visible(
    batch: int, length: int, window: int, document_starts: torch.Tensor | None
) -> torch.Tensor:
    """Return visible_BSS[sample, query, key]."""
    starts = torch.arange(batch) * length if document_starts is None else document_starts
    document_BS = torch.searchsorted(starts, torch.arange(batch * length), right=True).view(
        batch, length
    )
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)
    reach = window or length
    return (
        (distance_SS >= 0)
        & (distance_SS < reach)
        & (document_BS[:, :, None] == document_BS[:, None, :])
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def attention() -> AttentionFunction:
    return plain_attention


@pytest.fixture
def build() -> Callable[..., GPT]:
    def build(
        config: ModelConfig, attention: AttentionFunction = plain_attention, seed: int = 1
    ) -> GPT:
        return initialization.build(GPT, config, VOCABULARY, LENGTH, attention, seed=seed)

    return build


@pytest.fixture
def llama() -> ModelConfig:
    return CONFIGS["llama"]


@pytest.fixture
def gpt_oss() -> ModelConfig:
    return CONFIGS["gpt-oss"]


@pytest.fixture
def qwen() -> ModelConfig:
    return CONFIGS["qwen"]


@pytest.fixture
def tokens_BS() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH))


@pytest.fixture
def positions_S() -> torch.Tensor:
    return torch.arange(LENGTH)
