"""Layers split over tensor ranks equal whole layers: losses and gradients in float64."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import build
from megatron_ring.parallel.tensor import split_of
from megatron_ring.parallel.tensor_exchange import ALONE, TensorParallel
from tests.distributed import run_ranks
from tests.model.conftest import plain_attention

VOCABULARY, LENGTH = 61, 12
SHAPE = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 36}
CONFIGS = {
    "llama": ModelConfig(
        **SHAPE, softmax_type="learnable", untie_embeddings_and_output_weights=True
    ),
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
    """Return the loss and, by parameter, its gradient with its Split (None if it is not split)."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS, targets_BS = torch.randint(VOCABULARY, (2, 2, LENGTH), generator=generator)
    model = build(
        GPT,
        config,
        VOCABULARY,
        LENGTH,
        plain_attention,
        seed=1,
        tensor=tensor,
        memory=MemoryConfig(loss_chunk_size=5),
    ).double()
    # At their initial values, a missing gradient of biases and norms would not show.
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
def test_loss_and_gradients_equal_those_of_the_whole_model(size, sequence_parallel):
    ranks = run_ranks(size, one_rank, sequence_parallel)
    for name, config in CONFIGS.items():
        expected_loss, expected = loss_and_gradients(config, ALONE)
        losses, gradients = zip(*(rank[name] for rank in ranks), strict=True)
        assert losses == pytest.approx([expected_loss] * size, rel=1e-12)
        assert any(split for _, split in gradients[0].values())
        for parameter, (whole, _) in expected.items():
            gradient, split = gradients[0][parameter]
            of_ranks = [of_rank[parameter][0] for of_rank in gradients]
            if split:
                gradient = torch.cat(of_ranks, dim=split.dim)
            else:
                assert all(torch.equal(of_rank, gradient) for of_rank in of_ranks), parameter
            torch.testing.assert_close(
                gradient, whole, rtol=1e-10, atol=1e-12, msg=lambda m, p=parameter: f"{p}: {m}"
            )


def test_parts_of_an_uneven_vocabulary_are_contiguous_and_cover_it():
    parts = [TensorParallel(None, rank, 4).part(61) for rank in range(4)]
    assert [len(part) for part in parts] == [16, 16, 16, 13]
    assert [i for part in parts for i in part] == list(range(61))


def test_fewer_rows_than_ranks_leave_the_last_parts_empty():
    assert [len(TensorParallel(None, rank, 4).part(3)) for rank in range(4)] == [1, 1, 1, 0]
    assert [len(TensorParallel(None, rank, 4).part(5)) for rank in range(4)] == [2, 2, 1, 0]


COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor")


class CollectiveCounter:
    """Counts calls of collectives by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: Counter[str] = Counter()
        for name in COLLECTIVES:
            monkeypatch.setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, collective: Callable) -> Callable:
        def count(*args: object, **kwargs: object) -> object:
            self.calls[name] += 1
            return collective(*args, **kwargs)

        return count

    def reset(self) -> dict[str, int]:
        """Return the counts since the last reset."""
        calls = dict(self.calls)
        self.calls.clear()
        return calls


def saved_by_a_layer(rank: int, world_size: int) -> tuple[dict[str, int], list[dict]]:
    """Return how many gathered (B, l, E) a layer saves, by model, and its collectives."""
    gathered_saved = {}
    collectives = []
    for name, model_config in CONFIGS.items():
        tensor = TensorParallel.of(dist.group.WORLD, sequence_parallel=True)
        model = build(GPT, model_config, VOCABULARY, LENGTH, plain_attention, seed=1, tensor=tensor)
        rotation = model.rotation(torch.arange(LENGTH))
        block = model.blocks["0"]
        present = [*block.parameters(), *(vars(rotation).values() if rotation else ())]
        excluded = {x.untyped_storage().data_ptr() for x in present}
        saved = {}

        def pack(x: torch.Tensor, saved: dict = saved, excluded: set = excluded) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in excluded:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x

        x_BmE = torch.randn(1, LENGTH // world_size, model_config.hidden_size, requires_grad=True)
        with pytest.MonkeyPatch.context() as monkeypatch:
            counter = CollectiveCounter(monkeypatch)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = block(x_BmE, rotation, None)
            forward = counter.reset()
            y.sum().backward()
            collectives.append([forward, counter.reset()])
        gathered_bytes = LENGTH * model_config.hidden_size * x_BmE.itemsize
        gathered_saved[name] = sum(size == gathered_bytes for size, _ in saved.values())
    return gathered_saved, collectives


def test_a_layer_saves_no_gathered_input_and_gathers_each_again_in_backward():
    """Forward: two inputs gathered, two outputs scattered; backward the reverse, and the inputs."""
    for gathered_saved, collectives in run_ranks(2, saved_by_a_layer):
        assert gathered_saved == dict.fromkeys(CONFIGS, 0)
        for forward, backward in collectives:
            assert forward == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
            assert backward == {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 2}
