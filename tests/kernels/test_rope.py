"""RoPE and its scalings: published formulas, transformers' numbers, properties of a rotation."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.kernels.rope import Rope, rotate

ORIGINAL = "original_max_position_embeddings"

ROPES = {
    "none": Rope(64, 10000.0),
    "linear": Rope(64, 10000.0, "linear", 4.0),
    "ntk": Rope(64, 10000.0, "ntk", 4.0),
    "yarn": Rope(64, 10000.0, "yarn", 4.0, 2048),
    "llama3": Rope(64, 500000.0, "llama3", 8.0, 8192),
}

every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def none(base, pair, dim):
    return base ** (-2 * pair / dim)


def linear(base, pair, dim, factor):
    return none(base, pair, dim) / factor


def ntk(base, pair, dim, factor):
    return none(base * factor ** (dim / (dim - 2)), pair, dim)


def yarn(base, pair, dim, factor, length):
    first = max(math.floor(dim / 2 * math.log(length / (2 * math.pi * 32), base)), 0)
    last = math.ceil(dim / 2 * math.log(length / (2 * math.pi), base))
    kept = 1 - min(max((pair - first) / (last - first), 0), 1)
    return none(base, pair, dim) * (kept + (1 - kept) / factor)


def llama3(base, pair, dim, factor, length):
    frequency = none(base, pair, dim)
    wavelength = 2 * math.pi / frequency
    if wavelength < length / 4:
        return frequency
    if wavelength > length:
        return frequency / factor
    smooth = (length / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("formula", "scaling_arguments"),
    [
        (none, ()),
        (linear, (4.0,)),
        (ntk, (4.0,)),
        (yarn, (4.0, 4096)),
        (yarn, (32.0, 500)),
        (llama3, (8.0, 8192)),
    ],
)
def test_frequencies_match_the_published_formula(formula, scaling_arguments, base, dim):
    expected = [formula(base, pair, dim, *scaling_arguments) for pair in range(dim // 2)]
    rope = Rope(dim, base, formula.__name__, *scaling_arguments)
    torch.testing.assert_close(
        rope.frequencies(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        (
            Rope(128, 500000.0, "llama3", 8.0, 8192),
            {
                20: 1.6560440883e-2,
                30: 1.3718936825e-3,
                32: 5.2484602202e-4,
                34: 1.7850779113e-4,
                63: 3.0689258779e-7,
            },
        ),
        (
            Rope(128, 10000.0, "yarn", 16.0, 4096),
            {
                20: 5.6234128773e-2,
                25: 2.2447140887e-2,
                30: 8.5268439725e-3,
                45: 1.5177164460e-4,
                63: 7.2173870649e-6,
            },
        ),
    ],
    ids=["llama 3.1", "yarn-llama-2-64k"],
)
def test_frequencies_match_known_models(rope, known):
    """Numbers printed by transformers 5.23, in float32, for the settings of these models."""
    for pair, frequency in known.items():
        assert rope.frequencies()[pair].item() == pytest.approx(frequency, rel=1e-5)


# The rope_scaling of a published config.json, and our Rope for it, its head_dim and its rope_theta.
PUBLISHED = {
    "Llama 3.1": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            ORIGINAL: 8192,
        },
        Rope(128, 500000.0, "llama3", 8.0, 8192),
    ),
    "Llama 3.2": (
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            ORIGINAL: 8192,
        },
        Rope(64, 500000.0, "llama3", 32.0, 8192),
    ),
    "Qwen 2.5 and 3": (
        {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768},
        Rope(128, 1000000.0, "yarn", 4.0, 32768),
    ),
    "the defaults of YaRN, explicitly": (
        {
            "rope_type": "yarn",
            "factor": 16.0,
            ORIGINAL: 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "truncate": True,
        },
        Rope(128, 10000.0, "yarn", 16.0, 4096),
    ),
    "linear": ({"rope_type": "linear", "factor": 4.0}, Rope(128, 10000.0, "linear", 4.0)),
}


def from_transformers(
    rope_scaling: dict, rope: Rope, **at_length: int
) -> tuple[torch.Tensor, float]:
    """Frequencies and magnitude from transformers, in float32, for a model of 4,096 tokens."""
    transformers = pytest.importorskip("transformers")
    initial = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    config = transformers.LlamaConfig(
        head_dim=rope.head_dim,
        rope_theta=rope.base,
        max_position_embeddings=4096,
        rope_scaling=dict(rope_scaling),  # a copy, because transformers adds keys
    )
    frequency_P, magnitude = initial[rope_scaling["rope_type"]](config, device="cpu", **at_length)
    return frequency_P.double(), magnitude


@pytest.mark.parametrize(("rope_scaling", "rope"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_scalings_match_transformers(rope_scaling, rope):
    frequency_P, magnitude = from_transformers(rope_scaling, rope)
    torch.testing.assert_close(rope.frequencies(), frequency_P, rtol=1e-6, atol=0)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize(("length", "factor"), [(4096, 1.0), (8192, 3.0), (12288, 5.0)])
def test_dynamic_scaling_is_ntk_scaling_at_a_fixed_length(length, factor):
    """transformers scales by the current length: 2 x length / 4096 - 1 with its factor of 2."""
    rope = Rope(128, 10000.0, "ntk", factor)
    frequency_P, magnitude = from_transformers(
        {"rope_type": "dynamic", "factor": 2.0}, rope, seq_len=length
    )
    torch.testing.assert_close(rope.frequencies(), frequency_P, rtol=1e-6, atol=0)
    assert rope.magnitude == magnitude


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    plain = Rope(64, 10000.0).frequencies()
    scaled = ROPES["ntk"].frequencies()
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 4)


@pytest.mark.parametrize("scaling", ["none", "ntk"])
def test_a_single_pair_rotates_by_one_radian_per_token(scaling):
    assert Rope(2, 10000.0, scaling, 4.0).frequencies().tolist() == [1.0]


def test_the_pairs_are_the_two_halves_of_a_head():
    x_BlHD = torch.eye(4).view(1, 1, 4, 4)
    slow = 3 * 10000**-0.5
    rotated_HD = rotate(x_BlHD, Rope(4, 10000.0).rotation(torch.tensor([3])))[0, 0]
    expected_HD = torch.tensor(
        [
            [math.cos(3), 0, math.sin(3), 0],
            [0, math.cos(slow), 0, math.sin(slow)],
            [-math.sin(3), 0, math.cos(3), 0],
            [0, -math.sin(slow), 0, math.cos(slow)],
        ]
    )
    torch.testing.assert_close(rotated_HD, expected_HD)


@every_rope
def test_position_zero_is_not_rotated(rope):
    x_BlHD = normal(1, 1, 2, 64)
    torch.testing.assert_close(
        rotate(x_BlHD, rope.rotation(torch.tensor([0]))), x_BlHD * rope.magnitude
    )


@every_rope
@settings(max_examples=20, deadline=None)
@given(query=st.integers(0, 10**6), key=st.integers(0, 10**6), shift=st.integers(0, 10**6))
def test_scores_depend_only_on_the_distance(rope, query, key, shift):
    q_BlHD, k_BlHD = normal(2, 1, 1, 1, 64).double()

    def score(query, key):
        rotated_q = rotate(q_BlHD, rope.rotation(torch.tensor([query])))
        rotated_k = rotate(k_BlHD, rope.rotation(torch.tensor([key])))
        return (rotated_q * rotated_k).sum()

    torch.testing.assert_close(
        score(query, key), score(query + shift, key + shift), rtol=0, atol=1e-5
    )


def test_yarn_scales_queries_and_keys_by_its_temperature():
    x_BlHD = normal(1, 5, 2, 64)
    rotated_BlHD = rotate(x_BlHD, ROPES["yarn"].rotation(torch.arange(5)))
    torch.testing.assert_close(
        rotated_BlHD.norm(dim=-1), x_BlHD.norm(dim=-1) * (0.1 * math.log(4) + 1)
    )


@every_rope
def test_cos_and_sin_have_float32_precision_at_position_one_million(rope):
    positions = [100_000, 123_457, 999_999, 1_000_000]
    rotation = rope.rotation(torch.tensor(positions))
    frequencies = rope.frequencies().tolist()
    angles = [[position * frequency for frequency in frequencies] for position in positions]
    cos_lP = torch.tensor([[rope.magnitude * math.cos(angle) for angle in row] for row in angles])
    sin_lP = torch.tensor([[rope.magnitude * math.sin(angle) for angle in row] for row in angles])
    torch.testing.assert_close(rotation.cos_lP, cos_lP, rtol=0, atol=2e-7)
    torch.testing.assert_close(rotation.sin_lP, sin_lP, rtol=0, atol=2e-7)


def test_bfloat16_is_rotated_in_float32_and_rounded_once():
    x_BlHD = normal(2, 5, 3, 64).bfloat16()
    rotation = ROPES["none"].rotation(torch.arange(5) * 1000)
    rotated_BlHD = rotate(x_BlHD, rotation)
    assert rotated_BlHD.dtype == torch.bfloat16
    assert torch.equal(rotated_BlHD, rotate(x_BlHD.float(), rotation).bfloat16())


def test_positions_may_differ_between_samples():
    rope = ROPES["none"]
    x_BlHD = normal(2, 3, 1, 64)
    positions_Bl = torch.tensor([[0, 1, 2], [5, 0, 1]])
    together = rotate(x_BlHD, rope.rotation(positions_Bl))
    for x_lHD, positions_l, rotated_lHD in zip(x_BlHD, positions_Bl, together):
        assert torch.equal(rotated_lHD, rotate(x_lHD[None], rope.rotation(positions_l))[0])
