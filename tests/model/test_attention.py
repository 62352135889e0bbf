"""The attention layer: heads, norms, rotation, grouped keys and sinks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.rope import rotate
from megatron_ring.model.attention import AttentionFunction, SelfAttention, with_sink
from megatron_ring.model.gpt import rope
from megatron_ring.model.initialization import initialize
from tests import oracle

# Keys visible to each query, a group of marks per query, in two samples of five tokens.
CAUSAL = "x.... xx... xxx.. xxxx. xxxxx"
VISIBLE = {
    "causal": (0, None, [CAUSAL, CAUSAL]),
    "self only": (1, None, ["x.... .x... ..x.. ...x. ....x"] * 2),
    "window": (3, None, ["x.... xx... xxx.. .xxx. ..xxx"] * 2),
    "wider than the sample": (9, None, [CAUSAL, CAUSAL]),
    "documents": (
        0,
        [0, 3, 5, 6],
        ["x.... xx... xxx.. ...x. ...xx", "x.... .x... .xx.. .xxx. .xxxx"],
    ),
    "both": (2, [0, 3, 5, 6], ["x.... xx... .xx.. ...x. ...xx", "x.... .x... .xx.. ..xx. ...xx"]),
}


@pytest.mark.parametrize(("window", "starts", "drawn"), VISIBLE.values(), ids=VISIBLE)
def test_the_attention_of_these_tests_has_the_drawn_masks(attention, window, starts, drawn):
    q_BSHD, k_BSGD, v_BSGD, dout_BSHD = oracle.random_inputs(batch=2, tokens=5, heads=4, groups=2)
    out_BSHD, lse_BHS = attention(q_BSHD, k_BSGD, v_BSGD, window, starts and torch.tensor(starts))
    for sample in (0, 1):
        one = slice(sample, sample + 1)
        visible_SS = torch.tensor([[mark == "x" for mark in row] for row in drawn[sample].split()])
        expected = oracle.attention(
            q_BSHD[one], k_BSGD[one], v_BSGD[one], dout_BSHD[one], visible_SS
        )
        torch.testing.assert_close(out_BSHD[one], expected.out)
        torch.testing.assert_close(lse_BHS[one], expected.lse)


def initialized(config: ModelConfig, attention: AttentionFunction, window: int) -> SelfAttention:
    layer = SelfAttention(config, attention, window)
    initialize(layer, config, seed=1, prefix="blocks.0.attention")
    return layer


def test_the_attention_function_gets_query_heads_and_fewer_key_value_heads(llama):
    received = {}

    def attention(q_BlHD, k_BlGD, v_BlGD, window, document_starts):
        received.update(q=q_BlHD.shape, k=k_BlGD.shape, v=v_BlGD.shape)
        return q_BlHD, None

    layer = initialized(llama, attention, window=0)
    assert layer(torch.randn(3, 5, 32), rotation=None, document_starts=None).shape == (3, 5, 32)
    assert received == {"q": (3, 5, 4, 8), "k": (3, 5, 2, 8), "v": (3, 5, 2, 8)}


def test_queries_and_keys_are_rotated_and_values_are_not(llama):
    received = []
    layer = initialized(
        llama, lambda q, k, v, *_: received.append((q, k, v)) or (q, None), window=0
    )
    x_BlE, rotation = torch.randn(1, 3, 32), rope(llama, 4096).rotation(torch.tensor([7, 2, 4000]))
    layer(x_BlE, None, None)
    layer(x_BlE, rotation, None)
    (q, k, v), (rotated_q, rotated_k, same_v) = received
    assert torch.equal(rotated_q, rotate(q, rotation))
    assert torch.equal(rotated_k, rotate(k, rotation))
    assert torch.equal(same_v, v)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_each_head_is_normalized_before_it_is_rotated(qwen, normalization):
    received, config = [], replace(qwen, normalization=normalization, norm_epsilon=0.5)
    layer = initialized(config, lambda q, k, v, *_: received.append((q, k)) or (q, None), window=0)
    x_BlE, rotation = torch.randn(2, 3, 32), rope(config, 4096).rotation(torch.tensor([7, 2, 4000]))
    for head_norm in (layer.q_norm, layer.k_norm):
        nn.init.normal_(head_norm.weight)
    layer(x_BlE, rotation, None)
    for found_BlHD, proj, head_norm in zip(
        received[0], (layer.q_proj, layer.k_proj), (layer.q_norm, layer.k_norm)
    ):
        head_BlHD = proj(x_BlE).unflatten(-1, (-1, 16))
        head_BlHD = head_BlHD - head_BlHD.mean(-1, keepdim=True) * (normalization == "LayerNorm")
        root_BlH1 = (head_BlHD.square().mean(-1, keepdim=True) + 0.5).sqrt()
        torch.testing.assert_close(
            found_BlHD, rotate(head_BlHD / root_BlH1 * head_norm.weight, rotation)
        )


def test_heads_together_may_be_wider_than_the_stream(qwen, attention):
    layer = initialized(qwen, attention, window=0)
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == {
        "q_proj.weight": (64, 32),
        "q_proj.bias": (64,),
        "k_proj.weight": (32, 32),
        "k_proj.bias": (32,),
        "v_proj.weight": (32, 32),
        "v_proj.bias": (32,),
        "q_norm.weight": (16,),
        "k_norm.weight": (16,),
        "out_proj.weight": (32, 64),
    }
    assert layer(torch.randn(2, 5, 32), None, None).shape == (2, 5, 32)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values(
    llama, build, tokens_BS, positions_S
):
    grouped = build(llama)
    full = build(replace(llama, num_query_groups=0))
    weights = grouped.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(full(tokens_BS, positions_S), grouped(tokens_BS, positions_S))


def test_halves_of_the_projections_add_up_to_the_whole_layer(llama, attention):
    """A tensor rank has its heads' rows and columns, and partial results are summed."""
    whole, x_BlE = initialized(llama, attention, window=3), torch.randn(2, 5, 32)
    partial = []
    for half in (0, 1):
        part = initialized(llama, attention, window=3)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part, name).weight = torch.nn.Parameter(
                getattr(whole, name).weight.chunk(2, dim=0)[half]
            )
        part.out_proj.weight = torch.nn.Parameter(whole.out_proj.weight.chunk(2, dim=1)[half])
        partial.append(part(x_BlE, None, None))
    torch.testing.assert_close(partial[0] + partial[1], whole(x_BlE, None, None))


def test_a_sink_equals_one_more_column_of_scores_without_a_value():
    """In the output and in the gradients of scores, values and sink."""
    scores_BHSS = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    v_BHSD = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    sink_H = torch.tensor([-1.0, 0.0, 2.5], dtype=torch.float64, requires_grad=True)
    columns = torch.cat([scores_BHSS, sink_H.view(3, 1, 1).expand(2, 3, 5, 1)], dim=-1)
    expected_BHSD = columns.softmax(-1)[..., :-1] @ v_BHSD
    out_BSHD = (scores_BHSS.softmax(-1) @ v_BHSD).transpose(1, 2)
    actual_BHSD = with_sink(out_BSHD, scores_BHSS.logsumexp(-1), sink_H).transpose(1, 2)
    torch.testing.assert_close(actual_BHSD, expected_BHSD)
    dout_BHSD, inputs = torch.randn_like(expected_BHSD), (scores_BHSS, v_BHSD, sink_H)
    expected = torch.autograd.grad(expected_BHSD, inputs, dout_BHSD)
    torch.testing.assert_close(torch.autograd.grad(actual_BHSD, inputs, dout_BHSD), expected)


def test_the_gradient_of_a_sink_is_minus_its_probability_times_the_output_gradient():
    out_BSHD, dout_BSHD = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    lse_BHS, sink_H = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    with_sink(out_BSHD, lse_BHS, sink_H.requires_grad_()).backward(dout_BSHD)
    sink_H1 = sink_H.detach()[:, None]
    dot_BHS = (dout_BSHD * with_sink(out_BSHD, lse_BHS, sink_H.detach())).sum(-1).transpose(1, 2)
    probability_BHS = (sink_H1 - torch.logaddexp(lse_BHS, sink_H1)).exp()
    torch.testing.assert_close(sink_H.grad, -(probability_BHS * dot_BHS).sum((0, 2)))


def test_off_by_one_equals_a_learnable_sink_of_zero_and_is_no_parameter(llama, attention):
    learnable = initialized(replace(llama, softmax_type="learnable"), attention, window=0)
    off_by_one = initialized(replace(llama, softmax_type="off-by-one"), attention, window=0)
    assert dict(learnable.named_parameters())["sink_H"].shape == (4,)
    assert (
        "sink_H" not in off_by_one.state_dict().keys() | dict(off_by_one.named_parameters()).keys()
    )
    off_by_one.load_state_dict(
        {name: value for name, value in learnable.state_dict().items() if name != "sink_H"}
    )
    x_BlE = torch.randn(2, 5, 32)
    torch.testing.assert_close(off_by_one(x_BlE, None, None), learnable(x_BlE, None, None))


def test_a_sink_of_a_very_low_score_leaves_the_softmax_vanilla(llama, attention):
    vanilla = initialized(llama, attention, window=0)
    learnable = initialized(replace(llama, softmax_type="learnable"), attention, window=0)
    learnable.load_state_dict({**vanilla.state_dict(), "sink_H": torch.full((4,), -50.0)})
    x_BlE = torch.randn(2, 5, 32)
    torch.testing.assert_close(learnable(x_BlE, None, None), vanilla(x_BlE, None, None))


@pytest.mark.parametrize("softmax_type", ["off-by-one", "learnable"])
def test_a_sink_is_cast_with_the_model_and_computed_in_float32(llama, attention, softmax_type):
    layer = initialized(replace(llama, softmax_type=softmax_type), attention, window=0).bfloat16()
    assert layer.sink_H.dtype == torch.bfloat16
    assert layer(torch.randn(2, 5, 32, dtype=torch.bfloat16), None, None).dtype == torch.bfloat16
    out_BlHD, lse_BHl = torch.randn(2, 5, 4, 8, dtype=torch.bfloat16), torch.randn(2, 4, 5) + 5
    exact_BlHD = with_sink(out_BlHD.double(), lse_BHl.double(), layer.sink_H.double())
    assert torch.equal(with_sink(out_BlHD, lse_BHl, layer.sink_H), exact_BlHD.float().bfloat16())
