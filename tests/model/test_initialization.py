"""Initial weights depend on seed and name only, and a rank stores the elements that it owns."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.config import ModelConfig
from megatron_ring.model import initialization
from megatron_ring.model.gpt import GPT, Layers
from megatron_ring.model.initialization import (
    RESIDUAL_PROJECTIONS,
    initialize,
    materialize,
    random_blocks,
)
from megatron_ring.parallel.tensor import split_of
from megatron_ring.parallel.tensor_exchange import TensorParallel
from tests.model.conftest import LENGTH, VOCABULARY, plain_attention


def whole_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the weight as the first versions drew it: whole, in a single call."""
    if name.endswith((".bias", ".sink_H")):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    deviation = config.init_method_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        deviation /= (2 * config.num_layers) ** 0.5
    return torch.randn(shape, generator=initialization._generator(name, seed)) * deviation


def built(config: ModelConfig, **options: object) -> GPT:
    return initialization.build(GPT, config, VOCABULARY, LENGTH, plain_attention, seed=5, **options)


@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 40),
    block_elements=st.integers(1, 3000),
)
def test_blocks_have_the_bits_of_a_single_draw(rows, columns, block_elements):
    whole = torch.randn((rows, columns), generator=torch.Generator().manual_seed(3))
    blocks = list(random_blocks((rows, columns), torch.Generator().manual_seed(3), block_elements))
    assert torch.equal(torch.cat([block for _, block in blocks]), whole)
    stops = [row + len(block) for row, block in blocks]
    assert [row for row, _ in blocks] == [0, *stops[:-1]]
    largest = max(block_elements, 16 * columns) + 15 * columns
    assert max(block.numel() for _, block in blocks) <= largest


@pytest.mark.parametrize("shape", [(3000, 4099), (65_536, 257)])
def test_blocks_of_the_default_size_have_the_bits_of_a_single_draw(shape):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for row, block in random_blocks(shape, torch.Generator().manual_seed(3)):
        assert block.nbytes <= 17 << 20
        assert torch.equal(block, whole[row : row + len(block)])


def test_the_generator_consumes_the_stream_alike_however_it_is_cut():
    """float32 on a CPU: ``normal_`` in place, and the state that is left, in multiples of 16."""
    one, many = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    whole = torch.empty(16 * 50).normal_(generator=one)
    parts = [torch.empty(16 * n).normal_(generator=many) for n in (1, 2, 3, 44)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(one.get_state(), many.get_state())


def test_the_seed_alone_decides(config, build):
    torch.manual_seed(1)
    first = build(config, seed=5).state_dict()
    torch.manual_seed(2)
    second = build(config, seed=5).state_dict()
    other = build(config, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(
        torch.equal(first[name], other[name]) for name in first if first[name].dim() == 2
    )


@pytest.mark.parametrize("block_elements", [1, 700, 1 << 22])
def test_weights_are_those_of_a_whole_draw_of_each_parameter(config, block_elements, monkeypatch):
    blocks = partial(random_blocks, block_elements=block_elements)
    monkeypatch.setattr(initialization, "random_blocks", blocks)
    for name, value in built(config).state_dict().items():
        assert torch.equal(value, whole_weight(name, value.shape, config, seed=5))


@pytest.mark.parametrize("block_elements", [1, 700])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_tensor_rank_has_its_part_of_the_whole_weights(
    config, ranks, block_elements, monkeypatch
):
    blocks = partial(random_blocks, block_elements=block_elements)
    monkeypatch.setattr(initialization, "random_blocks", blocks)
    whole = built(config).state_dict()
    for rank in range(ranks):
        model = built(config, tensor=TensorParallel(rank=rank, size=ranks))
        for name, parameter in model.named_parameters():
            expected = whole[name]
            if split := split_of(parameter):
                expected = expected.narrow(split.dim, split.indices.start, len(split.indices))
            assert torch.equal(parameter, expected)


@pytest.mark.parametrize("block_elements", [1, 700])
@pytest.mark.parametrize("partitions", [2, 5])
def test_partitions_of_a_part_make_up_the_part(config, partitions, block_elements, monkeypatch):
    blocks = partial(random_blocks, block_elements=block_elements)
    monkeypatch.setattr(initialization, "random_blocks", blocks)
    tensor = TensorParallel(rank=1, size=2)
    whole = built(config, tensor=tensor)
    partitioned = {name: [] for name, _ in whole.named_parameters()}
    for partition in range(partitions):
        owned = []

        def owned_elements(parameter, partition=partition, owned=owned):
            size = -(-parameter.numel() // partitions)
            owned.append(torch.full((size,), torch.nan))
            return owned[-1], partition * size

        with torch.device("meta"):
            model = GPT(config, VOCABULARY, LENGTH, plain_attention, tensor)
        initialize(model, config, 5, owned=owned_elements)
        for name, elements in zip(partitioned, owned, strict=True):
            partitioned[name].append(elements)
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat(partitioned[name])[: parameter.numel()], parameter.flatten())


def test_a_stage_has_the_weights_of_its_layers_in_the_whole_model(config):
    whole = built(config).state_dict()
    stage = initialization.build(
        Layers, config, LENGTH, plain_attention, seed=5, layers=range(1, 2)
    )
    assert all(torch.equal(value, whole[name]) for name, value in stage.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_type_has_the_float32_weights_rounded(config, dtype):
    expected = built(config).to(dtype)
    found = built(config, dtype=dtype)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_materialized_parameters_keep_their_attributes_and_their_order(qwen):
    tensor = TensorParallel(rank=0, size=2)
    with torch.device("meta"):
        model = GPT(qwen, VOCABULARY, LENGTH, plain_attention, tensor)
    before = [(name, vars(p), p.shape) for name, p in model.named_parameters()]
    materialize(model, "cpu", torch.float32)
    assert [(name, vars(p), p.shape) for name, p in model.named_parameters()] == before
    assert any(split_of(p) for p in model.parameters())
    assert any(p._backward_hooks for name, p in model.named_parameters() if "q_norm" in name)


def test_construction_on_meta_draws_no_random_numbers_and_allocates_nothing(config):
    state = torch.get_rng_state()
    built(config)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_numbers_are_these_on_every_machine(llama):
    _, block = next(random_blocks((4, 8), initialization._generator("embedding.weight", 1234)))
    drawn = block[0, :4] * llama.init_method_std
    expected = torch.tensor([0.0081591, 0.0197974, -0.0196235, -0.0301428])
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-6)


def test_no_two_matrices_have_the_same_numbers(config, build):
    matrices = [p.flatten()[:32] for p in build(config).parameters() if p.dim() == 2]
    assert len(torch.stack(matrices).unique(dim=0)) == len(matrices)


def test_another_layer_leaves_the_others_their_weights_but_for_the_residual_scale(config, build):
    shallow, deep = (build(replace(config, num_layers=n)).state_dict() for n in (2, 8))
    for name in shallow:
        ratio = (8 / 2) ** 0.5 if name.endswith(RESIDUAL_PROJECTIONS) else 1
        torch.testing.assert_close(shallow[name], deep[name] * ratio)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("embedding.weight", 0.02),
        ("blocks.1.attention.q_proj.weight", 0.02),
        ("blocks.1.mlp.gate_proj.weight", 0.02),
        ("blocks.1.attention.out_proj.weight", 0.01),
        ("blocks.1.mlp.down_proj.weight", 0.01),
    ],
)
def test_matrices_are_normal_with_the_deviation_of_their_kind(llama, name, deviation):
    wide = replace(llama, hidden_size=512, num_attention_heads=8, init_method_std=0.02)
    model = initialization.build(GPT, wide, 1000, LENGTH, plain_attention, seed=1)
    weight = model.get_parameter(name)
    assert weight.std().item() == pytest.approx(deviation, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=deviation / 100)


def test_norms_start_as_the_identity_and_biases_and_sinks_at_zero(config, build):
    for name, value in build(config).state_dict().items():
        if name.endswith(("bias", "sink_H")):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()


def test_a_model_that_is_given_a_seed_has_the_weights_of_build():
    config = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, add_qkv_bias=True)
    direct = GPT(config, VOCABULARY, LENGTH, plain_attention, seed=3).state_dict()
    built = initialization.build(GPT, config, VOCABULARY, LENGTH, plain_attention, seed=3)
    expected = built.state_dict()
    assert direct.keys() == expected.keys()
    assert [name for name in direct if not torch.equal(direct[name], expected[name])] == []


def test_a_model_that_is_given_a_seed_sums_the_gradients_that_build_sums(qwen):
    def summed(model: GPT) -> list[str]:
        return [name for name, p in model.named_parameters() if p._backward_hooks]

    tensor = TensorParallel(rank=0, size=2)
    direct = GPT(qwen, VOCABULARY, LENGTH, plain_attention, tensor, seed=5)
    assert summed(direct) == summed(built(qwen, tensor=tensor)) != []
