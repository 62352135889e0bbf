"""Layers split over tensor ranks are the whole layers: outputs and gradients in float64, parts laid together."""

import pytest
import torch
import torch.distributed as dist

from megatron_ring.config import ModelConfig
from megatron_ring.model.execution import Execution
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.tensor import split_of
from megatron_ring.parallel.tensor_exchange import ALONE, TensorParallel
from tests.distributed import run_ranks
from tests.model.conftest import plain_attention

VOCABULARY, LENGTH = 61, 12
SHAPE = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 36}
CONFIGS = {
    "llama": ModelConfig(**SHAPE, softmax_type="learnable", untie_embeddings_and_output_weights=True),
    "gpt2": ModelConfig(
        **SHAPE,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
    ),
    "qwen": ModelConfig(**SHAPE, kv_channels=4, qk_layernorm=True, add_qkv_bias=True),
    "normalised gpt2": ModelConfig(**SHAPE, normalization="LayerNorm", qk_layernorm=True),
}


def loss_and_gradients(config: ModelConfig, tensor: TensorParallel) -> tuple[float, dict]:
    """The loss, and by parameter its gradient with the range of it that is here (None: all)."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS, targets_BS = torch.randint(VOCABULARY, (2, 2, LENGTH), generator=generator)
    model = GPT(config, VOCABULARY, LENGTH, plain_attention, 1, Execution(tensor, loss_chunk_size=5)).double()
    # Biases and norms start where a forgotten gradient of theirs would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    loss = model(tokens_BS, torch.arange(LENGTH), None, targets_BS)
    loss.backward()
    return loss.item(), {name: (p.grad, split_of(p)) for name, p in model.named_parameters()}


def one_rank(rank: int, world_size: int, sequence_parallel: bool) -> dict[str, tuple[float, dict]]:
    tensor = TensorParallel.of(dist.group.WORLD, sequence_parallel)
    return {name: loss_and_gradients(config, tensor) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_loss_and_gradients_are_those_of_the_whole_model(size, sequence_parallel):
    ranks = run_ranks(size, one_rank, sequence_parallel)
    for name, config in CONFIGS.items():
        expected_loss, expected = loss_and_gradients(config, ALONE)
        losses, gradients = zip(*(rank[name] for rank in ranks), strict=True)
        assert losses == pytest.approx([expected_loss] * size, rel=1e-12)
        assert any(split for _, split in gradients[0].values())
        for parameter, (whole, _) in expected.items():
            found, split = gradients[0][parameter]
            if split:
                found = torch.cat([of_rank[parameter][0] for of_rank in gradients], dim=split.dim)
            else:
                assert all(torch.equal(of_rank[parameter][0], found) for of_rank in gradients), parameter
            torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12, msg=lambda m, p=parameter: f"{p}: {m}")


def test_an_uneven_vocabulary_is_split_in_runs_and_covers_itself():
    parts = [TensorParallel(None, rank, 4).part(61) for rank in range(4)]
    assert [len(part) for part in parts] == [16, 16, 16, 13]
    assert [i for part in parts for i in part] == list(range(61))


def test_fewer_rows_than_ranks_leave_the_last_ones_empty():
    assert [len(TensorParallel(None, rank, 4).part(3)) for rank in range(4)] == [1, 1, 1, 0]
    assert [len(TensorParallel(None, rank, 4).part(5)) for rank in range(4)] == [2, 2, 1, 0]
