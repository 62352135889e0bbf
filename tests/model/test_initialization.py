from dataclasses import replace

import pytest
import torch

from megatron_ring.model.initialization import RESIDUAL_PROJECTIONS, initial_weight


def test_the_seed_alone_decides(config, build):
    torch.manual_seed(1)
    first = build(config, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = build(config, seed=5).state_dict(), build(config, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(
        torch.equal(first[name], other[name]) for name in first if first[name].dim() == 2
    )


def test_a_parameter_can_be_drawn_without_the_others(config, build):
    for name, value in reversed(build(config, seed=5).state_dict().items()):
        assert torch.equal(value, initial_weight(name, value.shape, config, seed=5))


def test_the_numbers_are_these_on_every_machine(llama):
    drawn = initial_weight("embedding.weight", (4, 8), llama, seed=1234)[0, :4]
    torch.testing.assert_close(
        drawn, torch.tensor([0.0081591, 0.0197974, -0.0196235, -0.0301428]), rtol=0, atol=1e-6
    )


def test_no_two_matrices_are_alike(config, build):
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
    weight = initial_weight(name, (400, 500), llama, seed=1)
    assert weight.std().item() == pytest.approx(deviation, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=deviation / 100)


def test_norms_start_as_the_identity_and_biases_and_sinks_at_zero(config, build):
    for name, value in build(config).state_dict().items():
        if name.endswith(("bias", "sink_H")):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
