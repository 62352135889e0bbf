"""The running softmax: merging blocks, and outputs that are constructed from delta."""

import pytest
import torch

from megatron_ring.kernels.attention import running_softmax
from megatron_ring.kernels.attention.running_softmax import (
    FinalOutput,
    KnownDelta,
    RunningSoftmax,
    accumulation_dtype,
    delta,
    delta_of,
    output_from_delta,
    output_of,
    slice_heads,
)

B, L, H, D, BLOCKS, KEYS = 2, 5, 3, 4, 4, 6


@pytest.fixture
def blocks() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, H, L, BLOCKS, KEYS) and values (B, H, BLOCKS, KEYS, D)."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, H, L, BLOCKS, KEYS, generator=generator, dtype=torch.float64) * 3
    return scores, torch.randn(B, H, BLOCKS, KEYS, D, generator=generator, dtype=torch.float64)


def merged(scores: torch.Tensor, values: torch.Tensor, order: list[int]) -> RunningSoftmax:
    state = RunningSoftmax.empty(torch.empty(B, L, H, D, dtype=torch.float64))
    for block in order:
        out_BLHD = torch.einsum(
            "bhlk,bhkd->blhd", scores[:, :, :, block].softmax(-1), values[:, :, block]
        )
        state.merge(slice(0, L), out_BLHD, scores[:, :, :, block].logsumexp(-1))
    return state


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("shift", [0.0, 5000.0, -5000.0])
def test_blocks_merge_to_the_softmax_over_all_of_them(blocks, shift, order):
    """The shifts would make a raw exponential of the scores overflow or underflow."""
    scores, values = blocks
    state = merged(scores + shift, values, order)
    expected = torch.einsum("bhlk,bhkd->blhd", scores.flatten(3).softmax(-1), values.flatten(2, 3))
    torch.testing.assert_close(state.out_BLHD, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        state.lse_BHL, (scores + shift).flatten(3).logsumexp(-1), rtol=1e-12, atol=1e-12
    )


def test_merge_changes_only_the_given_queries(blocks):
    scores, values = blocks
    state = merged(scores, values, [0])
    before = state.out_BLHD.clone(), state.lse_BHL.clone()
    state.merge(
        slice(1, 3),
        torch.ones(B, 2, H, D, dtype=torch.float64),
        torch.full((B, H, 2), 50.0, dtype=torch.float64),
    )
    unchanged = [0, 3, 4]
    assert torch.equal(state.out_BLHD[:, unchanged], before[0][:, unchanged])
    assert torch.equal(state.lse_BHL[..., unchanged], before[1][..., unchanged])
    assert torch.allclose(state.out_BLHD[:, 1:3], torch.ones((), dtype=torch.float64))


def test_a_block_without_visible_keys_has_no_weight(blocks):
    state = merged(*blocks, [0])
    before = state.out_BLHD.clone(), state.lse_BHL.clone()
    state.merge(
        slice(0, L), torch.zeros_like(state.out_BLHD), torch.full_like(state.lse_BHL, -torch.inf)
    )
    assert torch.equal(state.out_BLHD, before[0])
    assert torch.equal(state.lse_BHL, before[1])


def test_rows_stay_empty_until_they_see_a_key():
    state = RunningSoftmax.empty(torch.empty(B, L, H, D))
    state.merge(
        slice(0, L), torch.zeros_like(state.out_BLHD), torch.full_like(state.lse_BHL, -torch.inf)
    )
    assert (state.out_BLHD == 0).all()
    assert (state.lse_BHL == -torch.inf).all()
    state.merge(slice(0, L), torch.ones_like(state.out_BLHD), torch.zeros_like(state.lse_BHL))
    assert (state.out_BLHD == 1).all()
    assert (state.lse_BHL == 0).all()


@pytest.mark.parametrize("seen_before", [False, True])
def test_nan_in_a_block_propagates(blocks, seen_before):
    """It must reach the loss, where loss scaling and the user detect it."""
    state = merged(*blocks, [0] if seen_before else [])
    state.merge(
        slice(0, L), torch.zeros_like(state.out_BLHD), torch.full_like(state.lse_BHL, torch.nan)
    )
    assert state.out_BLHD.isnan().all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_the_state_is_float32_unless_the_queries_are_float64(dtype):
    state = RunningSoftmax.empty(torch.empty(B, L, H, D, dtype=dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert state.out_BLHD.dtype == state.lse_BHL.dtype == accumulation_dtype(dtype) == expected


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """An output and its gradient, (B, L, H, D), 0 for every third query, as for ignored labels."""
    generator = torch.Generator().manual_seed(0)
    out, dout = (
        torch.randn(B, L, H, D, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    dout[:, ::3] = 0
    return out, dout


# The relative error of delta: two roundings to the dtype (float16 has 11 significant bits, bfloat16
# 8) and one in float32.
HALF_PRECISION = {torch.bfloat16: 2**-16, torch.float16: 2**-20}
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, **HALF_PRECISION}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("equal", [False, True])
def test_output_from_delta_has_the_given_delta(rows, equal, size, dtype):
    """For gradients of any size, also with equal elements; it is 0 where the gradient is."""
    out, dout = rows[0].to(dtype), size * rows[1]
    dout = (dout.sign() * size if equal else dout).to(dtype)
    result = output_from_delta(delta(out, dout), dout)
    assert result.dtype == dtype
    assert delta(result, dout).dtype == accumulation_dtype(dtype)
    torch.testing.assert_close(delta(result, dout), delta(out, dout), rtol=ROUNDING[dtype], atol=0)
    assert (result[:, ::3] == 0).all()


@pytest.mark.parametrize("head_dim", [1, 2, 3, 48, 256, 300])
def test_at_most_two_elements_of_a_head_carry_delta(head_dim):
    """All others are 0, and with a head dim of 1 delta is rounded once."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(head_dim)
    out, dout = (torch.randn(1, 50, 2, head_dim, generator=generator).to(dtype) for _ in range(2))
    expected = delta(out, dout)
    result = output_from_delta(expected, dout)
    assert result.count_nonzero(-1).max() <= 2
    rounding = torch.finfo(dtype).eps if head_dim == 1 else ROUNDING[dtype]
    torch.testing.assert_close(delta(result, dout), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("dtype", HALF_PRECISION, ids=str)
def test_with_one_gradient_element_per_row_delta_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    out, at = torch.randn(1, 40, 2, 16, generator=generator).to(dtype), torch.arange(40) % 16
    dout = torch.nn.functional.one_hot(at, 16).to(dtype)[None, :, None].expand_as(out) * 3
    assert torch.equal(delta(output_from_delta(delta(out, dout), dout), dout), delta(out, dout))


def test_a_gradient_may_be_a_view(rows):
    """It may be a slice of heads, or one value expanded like the gradient of a sum."""
    out, dout = (x.float() for x in rows)
    heads = dout[:, :, 1:]
    assert torch.equal(
        output_from_delta(delta(out[:, :, 1:], heads), heads),
        output_from_delta(delta(out[:, :, 1:], heads), heads.contiguous()),
    )
    ones = torch.ones((), dtype=torch.float32).expand_as(out)
    torch.testing.assert_close(
        delta(output_from_delta(delta(out, ones), ones), ones), delta(out, ones)
    )


def test_output_from_delta_does_not_overflow_in_float16():
    """The sum over a head would, in a single element; so delta is distributed over all elements."""
    out = torch.full((1, 3, 2, 128), 3e3, dtype=torch.float16)
    dout = torch.full_like(out, 0.5)
    result = output_from_delta(delta(out, dout), dout)
    assert result.isfinite().all()
    torch.testing.assert_close(delta(result, dout), delta(out, dout), rtol=2**-20, atol=0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_delta_that_is_not_finite_propagates(rows, dtype):
    dout = rows[1].to(dtype)
    for wrong in (torch.inf, torch.nan):
        result = output_from_delta(
            torch.full((B, H, L), wrong, dtype=accumulation_dtype(dtype)), dout
        )
        assert not delta(result, dout)[..., [1, 2, 4]].isfinite().any()


def test_an_output_and_its_known_delta_are_interchangeable(rows):
    out, dout = rows
    known = KnownDelta(delta(out, dout), dout)
    final = FinalOutput.of(out, dout)
    assert output_of(out) is output_of(final) is out
    assert output_of(known) is output_of(known)
    assert torch.equal(delta_of(final, dout), delta_of(out, dout))
    torch.testing.assert_close(delta_of(known, dout), delta_of(out, dout))
    torch.testing.assert_close(delta_of(output_of(known), dout), delta_of(out, dout))
    some = slice(1, 3)
    of_known, of_out = slice_heads(known, some), slice_heads(out, some)
    dout = dout[:, :, some]
    torch.testing.assert_close(delta_of(of_known, dout), delta_of(of_out, dout))
    of_final = slice_heads(final, some)
    assert torch.equal(output_of(of_final), of_out)
    torch.testing.assert_close(delta_of(of_final, dout), delta_of(of_out, dout))


def test_delta_of_a_final_output_is_computed_once_for_all_slices_and_only_if_used(
    rows, monkeypatch
):
    out, dout = rows
    computed = []
    monkeypatch.setattr(
        running_softmax, "delta", lambda *tensors: computed.append(1) or delta(*tensors)
    )
    final = FinalOutput.of(out, dout)
    halves = [slice_heads(final, heads) for heads in (slice(0, 1), slice(1, 2))]
    assert [output_of(half).shape[2] for half in halves] == [1, 1]
    assert not computed
    for used in (*halves, final, *halves):
        delta_of(used, dout)
    assert len(computed) == 1


def test_delta_is_in_the_type_of_the_sums(rows):
    out, dout = (x.bfloat16() for x in rows)
    expected = torch.einsum("blhd,blhd->bhl", out.double(), dout.double())
    torch.testing.assert_close(delta(out, dout).double(), expected, rtol=1e-6, atol=1e-6)
