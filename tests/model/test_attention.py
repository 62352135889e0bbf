from dataclasses import replace

import torch

from megatron_ring.kernels.rope import rotate
from megatron_ring.model.attention import SelfAttention
from megatron_ring.model.gpt import rope


def test_the_attention_function_gets_query_heads_and_fewer_key_value_heads(llama):
    seen = {}

    def attention(q_BlHD, k_BlGD, v_BlGD):
        seen.update(q=q_BlHD.shape, k=k_BlGD.shape, v=v_BlGD.shape)
        return q_BlHD

    layer = SelfAttention(llama, attention)
    assert layer(torch.randn(3, 5, 32), rotation=None).shape == (3, 5, 32)
    assert seen == {"q": (3, 5, 4, 8), "k": (3, 5, 2, 8), "v": (3, 5, 2, 8)}


def test_queries_and_keys_arrive_turned_and_values_as_they_are(llama):
    seen = []
    layer = SelfAttention(llama, lambda q, k, v: seen.append((q, k, v)) or q)
    x_BlE, rotation = torch.randn(1, 3, 32), rope(llama, 4096).rotation(torch.tensor([7, 2, 4000]))
    layer(x_BlE, None)
    layer(x_BlE, rotation)
    (q, k, v), (turned_q, turned_k, same_v) = seen
    assert torch.equal(turned_q, rotate(q, rotation))
    assert torch.equal(turned_k, rotate(k, rotation))
    assert torch.equal(same_v, v)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values(llama, build, tokens_BS, positions_S):
    grouped = build(llama)
    full = build(replace(llama, num_query_groups=0))
    weights = grouped.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(full(tokens_BS, positions_S), grouped(tokens_BS, positions_S))


def test_half_the_rows_of_every_projection_are_half_the_heads(llama, attention):
    """What a tensor-parallel rank does: its heads' rows in, its heads' columns out, and the partial results summed."""
    whole, x_BlE = SelfAttention(llama, attention), torch.randn(2, 5, 32)
    partial = []
    for half in (0, 1):
        part = SelfAttention(llama, attention)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part, name).weight = torch.nn.Parameter(getattr(whole, name).weight.chunk(2, dim=0)[half])
        part.out_proj.weight = torch.nn.Parameter(whole.out_proj.weight.chunk(2, dim=1)[half])
        partial.append(part(x_BlE, None))
    torch.testing.assert_close(partial[0] + partial[1], whole(x_BlE, None))
