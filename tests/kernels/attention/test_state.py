import pytest
import torch

from megatron_ring.kernels.attention.state import (
    KnownDelta,
    RunningSoftmax,
    accumulation_dtype,
    delta,
    delta_of,
    heads_of,
    output_of,
    output_with,
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
    """Also where a raw exponential of the scores would overflow or vanish."""
    scores, values = blocks
    state = merged(scores + shift, values, order)
    expected = torch.einsum("bhlk,bhkd->blhd", scores.flatten(3).softmax(-1), values.flatten(2, 3))
    torch.testing.assert_close(state.out_BLHD, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        state.lse_BHL, (scores + shift).flatten(3).logsumexp(-1), rtol=1e-12, atol=1e-12
    )


def test_only_the_given_queries_are_touched(blocks):
    scores, values = blocks
    state = merged(scores, values, [0])
    before = state.out_BLHD.clone(), state.lse_BHL.clone()
    state.merge(
        slice(1, 3),
        torch.ones(B, 2, H, D, dtype=torch.float64),
        torch.full((B, H, 2), 50.0, dtype=torch.float64),
    )
    untouched = [0, 3, 4]
    assert torch.equal(state.out_BLHD[:, untouched], before[0][:, untouched])
    assert torch.equal(state.lse_BHL[..., untouched], before[1][..., untouched])
    assert torch.allclose(state.out_BLHD[:, 1:3], torch.ones((), dtype=torch.float64))


def test_a_block_without_visible_keys_weighs_nothing(blocks):
    state = merged(*blocks, [0])
    before = state.out_BLHD.clone(), state.lse_BHL.clone()
    state.merge(
        slice(0, L), torch.zeros_like(state.out_BLHD), torch.full_like(state.lse_BHL, -torch.inf)
    )
    assert torch.equal(state.out_BLHD, before[0])
    assert torch.equal(state.lse_BHL, before[1])


def test_rows_that_have_seen_nothing_stay_empty_until_they_see_something():
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
def test_a_diverged_block_is_not_hidden(blocks, seen_before):
    """Not-a-number must reach the loss, where loss scaling and the user look for it."""
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
    """An output and a gradient of it, (B, L, H, D); the gradient of every third query's is 0, as of unused labels'."""
    generator = torch.Generator().manual_seed(0)
    out, dout = (
        torch.randn(B, L, H, D, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    dout[:, ::3] = 0
    return out, dout


# Two roundings to the type, one in float32: float16 has 11 digits, bfloat16 8.
TWO_BYTES = {torch.bfloat16: 2**-16, torch.float16: 2**-20}
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, **TWO_BYTES}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("equal", [False, True])
def test_an_output_with_this_delta_has_it(rows, equal, size, dtype):
    """In the type of the gradient, whatever its size, also where all its elements are equal; and 0
    where the gradient is."""
    out, dout = rows[0].to(dtype), size * rows[1]
    dout = (dout.sign() * size if equal else dout).to(dtype)
    like = output_with(delta(out, dout), dout)
    assert like.dtype == dtype
    assert delta(like, dout).dtype == accumulation_dtype(dtype)
    torch.testing.assert_close(delta(like, dout), delta(out, dout), rtol=ROUNDING[dtype], atol=0)
    assert (like[:, ::3] == 0).all()


@pytest.mark.parametrize("head_size", [1, 2, 3, 48, 256, 300])
def test_the_two_largest_elements_of_any_head_carry_delta(head_size):
    """All others are 0, and a head of one element is rounded once."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(head_size)
    out, dout = (torch.randn(1, 50, 2, head_size, generator=generator).to(dtype) for _ in range(2))
    wanted = delta(out, dout)
    like = output_with(wanted, dout)
    assert like.count_nonzero(-1).max() <= 2
    rounding = torch.finfo(dtype).eps if head_size == 1 else ROUNDING[dtype]
    torch.testing.assert_close(delta(like, dout), wanted, rtol=rounding, atol=0)


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=str)
def test_where_the_gradient_has_one_element_the_output_is_what_it_was_there(dtype):
    generator = torch.Generator().manual_seed(0)
    out, at = torch.randn(1, 40, 2, 16, generator=generator).to(dtype), torch.arange(40) % 16
    dout = torch.nn.functional.one_hot(at, 16).to(dtype)[None, :, None].expand_as(out) * 3
    assert torch.equal(delta(output_with(delta(out, dout), dout), dout), delta(out, dout))


def test_a_gradient_may_be_a_view(rows):
    """Some heads of several, and one number for all elements, as the gradient of a sum is."""
    out, dout = (x.float() for x in rows)
    heads = dout[:, :, 1:]
    assert torch.equal(
        output_with(delta(out[:, :, 1:], heads), heads),
        output_with(delta(out[:, :, 1:], heads), heads.contiguous()),
    )
    ones = torch.ones((), dtype=torch.float32).expand_as(out)
    torch.testing.assert_close(delta(output_with(delta(out, ones), ones), ones), delta(out, ones))


def test_it_does_not_overflow_in_float16():
    """Where the sum over a head would: no element is much longer than the output it stands for."""
    out = torch.full((1, 3, 2, 128), 3e3, dtype=torch.float16)
    dout = torch.full_like(out, 0.5)
    like = output_with(delta(out, dout), dout)
    assert like.isfinite().all()
    torch.testing.assert_close(delta(like, dout), delta(out, dout), rtol=2**-20, atol=0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_delta_that_is_not_finite_is_not_hidden(rows, dtype):
    dout = rows[1].to(dtype)
    for wrong in (torch.inf, torch.nan):
        like = output_with(torch.full((B, H, L), wrong, dtype=accumulation_dtype(dtype)), dout)
        assert not delta(like, dout)[..., [1, 2, 4]].isfinite().any()


def test_an_output_and_what_stands_in_for_one_are_read_alike(rows):
    out, dout = rows
    known = KnownDelta(delta(out, dout), dout)
    assert output_of(out) is out
    assert output_of(known) is output_of(known)
    torch.testing.assert_close(delta_of(known, dout), delta_of(out, dout))
    torch.testing.assert_close(delta_of(output_of(known), dout), delta_of(out, dout))
    some = slice(1, 3)
    of_known, of_out = heads_of(known, some), heads_of(out, some)
    dout = dout[:, :, some]
    torch.testing.assert_close(delta_of(of_known, dout), delta_of(of_out, dout))


def test_delta_is_in_the_type_of_the_sums(rows):
    out, dout = (x.bfloat16() for x in rows)
    expected = torch.einsum("blhd,blhd->bhl", out.double(), dout.double())
    torch.testing.assert_close(delta(out, dout).double(), expected, rtol=1e-6, atol=1e-6)
