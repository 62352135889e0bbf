"""The forward pass of a GPT: masks, positions, documents, tied weights and parameter groups."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.rope import Rope
from megatron_ring.model.gpt import GPT, decay_groups
from megatron_ring.plan.parameters import parameter_count


def test_logits_have_a_row_per_token_and_a_column_per_token_id(
    config, build, tokens_BS, positions_S
):
    assert build(config)(tokens_BS, positions_S).shape == (2, 16, 48)


def test_logits_are_the_head_applied_to_the_hidden_states(config, build, tokens_BS, positions_S):
    model = build(config)
    hidden_BSE = model.hidden(tokens_BS, positions_S)
    assert hidden_BSE.shape == (2, 16, 32)
    assert torch.equal(model(tokens_BS, positions_S), model.head(hidden_BSE))


def test_no_token_depends_on_a_later_one(config, build, tokens_BS, positions_S):
    model, changed_BS = build(config), tokens_BS.clone()
    changed_BS[:, 10] = (changed_BS[:, 10] + 1) % 48
    same_BS = (model(tokens_BS, positions_S) == model(changed_BS, positions_S)).all(-1)
    assert same_BS[:, :10].all()
    assert not same_BS[:, 10:].any()


@pytest.mark.parametrize(
    "order_S", [torch.arange(16).view(4, 4).T.flatten(), torch.arange(16) * 5 % 16]
)
def test_permuted_tokens_and_positions_give_permuted_logits(
    config, build, attention, tokens_BS, positions_S, order_S
):
    back_S = order_S.argsort()

    def attention_in_order(q_BSHD, k_BSGD, v_BSGD, *mask):
        out_BSHD, lse_BHS = attention(
            q_BSHD[:, back_S], k_BSGD[:, back_S], v_BSGD[:, back_S], *mask
        )
        return out_BSHD[:, order_S], lse_BHS[:, :, order_S]

    expected_BSV = build(config).double()(tokens_BS, positions_S)[:, order_S]
    shuffled = build(config, attention_in_order).double()
    torch.testing.assert_close(shuffled(tokens_BS[:, order_S], positions_S[order_S]), expected_BSV)


def test_positions_matter(config, build, tokens_BS, positions_S):
    model = build(config)
    assert not torch.allclose(model(tokens_BS, positions_S), model(tokens_BS, positions_S.flip(0)))


def test_each_sample_may_number_its_own_tokens(config, build, tokens_BS, positions_S):
    model = build(config)
    each_BSV = model(tokens_BS, torch.stack([positions_S, positions_S.flip(0)]))
    torch.testing.assert_close(each_BSV[0], model(tokens_BS, positions_S)[0])
    torch.testing.assert_close(each_BSV[1], model(tokens_BS, positions_S.flip(0))[1])


def test_each_layer_has_its_window_and_all_have_the_documents(
    gpt_oss, build, attention, tokens_BS, positions_S
):
    calls = []

    def recorded(q_BSHD, k_BSGD, v_BSGD, window, document_starts):
        calls.append((window, document_starts))
        return attention(q_BSHD, k_BSGD, v_BSGD, window, document_starts)

    model = build(replace(gpt_oss, num_layers=5, window_attn_skip_freq=3), recorded)
    starts = torch.tensor([0, 5, 16])
    model(tokens_BS, positions_S, starts)
    assert [window for window, _ in calls] == [6, 6, 0, 6, 6]
    assert all(document_starts is starts for _, document_starts in calls)


def test_a_window_of_six_is_the_token_and_the_five_before_it(llama, build, tokens_BS, positions_S):
    model, changed_BS = build(replace(llama, num_layers=1, window_size=6)), tokens_BS.clone()
    changed_BS[:, 4] = (changed_BS[:, 4] + 1) % 48
    same_BS = (model(tokens_BS, positions_S) == model(changed_BS, positions_S)).all(-1)
    assert (~same_BS).nonzero()[:, 1].tolist() == [4, 5, 6, 7, 8, 9] * 2


def test_packed_documents_have_the_logits_of_separate_documents(config, build, tokens_BS):
    """Documents of 10, 6, 3 and 13 tokens in two samples; the positions restart with each."""
    model, lengths = build(config).double(), [10, 6, 3, 13]
    positions_BS = torch.cat([torch.arange(length) for length in lengths]).view(2, 16)
    packed_BSV = model(tokens_BS, positions_BS, torch.tensor([0, 10, 16, 19]))
    documents = tokens_BS.flatten().split(lengths)
    alone = [model(tokens[None], torch.arange(len(tokens))) for tokens in documents]
    torch.testing.assert_close(packed_BSV.flatten(0, 1), torch.cat(alone, dim=1)[0])


@pytest.mark.parametrize("untied", [False, True])
def test_gradient_reaches_every_parameter(config, build, tokens_BS, positions_S, untied):
    model = build(replace(config, untie_embeddings_and_output_weights=untied))
    model(tokens_BS, positions_S).square().sum().backward()
    # A bias on all keys shifts all scores of a query alike, to which softmax is invariant.
    without_gradient = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-6}
    assert all(name.endswith("k_proj.bias") for name in without_gradient)


def test_tied_output_weight_is_the_embedding(config, build):
    model = build(config)
    assert model.output_weight_VE is model.embedding.weight
    assert not [name for name in model.state_dict() if name.startswith("output")]


def test_an_untied_output_weight_has_its_own_initial_values(config, build):
    model = build(replace(config, untie_embeddings_and_output_weights=True))
    assert model.output_weight_VE is model.output.weight
    assert not torch.equal(model.output.weight, model.embedding.weight)


def test_the_rotation_is_computed_once_for_all_layers(
    llama, build, tokens_BS, positions_S, monkeypatch
):
    computed = []
    rotation = Rope.rotation
    monkeypatch.setattr(
        Rope, "rotation", lambda *args: computed.append(rotation(*args)) or computed[-1]
    )
    build(llama)(tokens_BS, positions_S)
    assert len(computed) == 1


def test_the_rotation_keeps_its_precision_in_a_bfloat16_model(llama, build):
    model = build(llama).bfloat16()
    positions_l = torch.tensor([100_000, 314_159, 999_999])
    rotation = model.rotation(positions_l)
    angles_lP = positions_l.double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    torch.testing.assert_close(rotation.cos_lP, angles_lP.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(rotation.sin_lP, angles_lP.sin().float(), rtol=0, atol=1e-7)


def test_bfloat16_model_gives_bfloat16_logits_near_the_float32_ones(
    config, build, tokens_BS, positions_S
):
    model = build(replace(config, init_method_std=0.1))
    expected_BSV = model(tokens_BS, positions_S)
    logits_BSV = model.bfloat16()(tokens_BS, positions_S)
    assert logits_BSV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_BSV.float(), expected_BSV, rtol=0, atol=0.03)


def test_rope_scaling_is_derived_from_the_whole_length_unless_the_original_one_is_given(
    llama, attention
):
    stretched = replace(llama, rope_scaling="yarn", rope_scaling_factor=4.0)
    assert GPT(stretched, 48, 4096, attention).rope == Rope(8, 10000.0, "yarn", 4.0, 1024)
    given_length = replace(stretched, rope_original_length=2048)
    for seq_length in (512, 4096, 8192, 10_000):
        assert GPT(given_length, 48, seq_length, attention).rope == Rope(
            8, 10000.0, "yarn", 4.0, 2048
        )


@settings(max_examples=40, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 8]),
    num_query_groups=st.sampled_from([0, 1, 2, 4]),
    ffn_hidden_size=st.sampled_from([0, 24]),
    normalization=st.sampled_from(["RMSNorm", "LayerNorm"]),
    activation=st.sampled_from(["swiglu", "gelu"]),
    add_bias_linear=st.booleans(),
    position_embedding_type=st.sampled_from(["rope", "learned_absolute"]),
    untie_embeddings_and_output_weights=st.booleans(),
    softmax_type=st.sampled_from(["vanilla", "off-by-one", "learnable"]),
)
def test_parameter_count_is_that_of_the_built_model(head_dim, **options):
    config = ModelConfig(hidden_size=4 * head_dim, num_attention_heads=4, **options)
    model = GPT(config, vocab_size=11, seq_length=7, attention=None)
    assert parameter_count(config, vocab_size=11, seq_length=7) == sum(
        p.numel() for p in model.parameters()
    )


def test_parameter_count_of_published_models():
    gpt2 = ModelConfig(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
    )
    llama_3_8b = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        untie_embeddings_and_output_weights=True,
    )
    assert parameter_count(gpt2, 50257, 1024) == 124_439_808
    assert parameter_count(llama_3_8b, 128256, 8192) == 8_030_261_248


def test_matrices_decay_and_vectors_do_not(config, build):
    model = build(config)
    decayed, not_decayed = decay_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in not_decayed["params"])
    together = decayed["params"] + not_decayed["params"]
    assert len(together) == len(set(together))
    assert set(together) == set(model.parameters())
