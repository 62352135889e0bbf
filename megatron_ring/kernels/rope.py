"""Rotary position embedding and its scaling to longer contexts.

Su et al. 2021, RoFormer, section 3.2.2.

Pair i of a head consists of its elements i and i + D/2 (the halves of GPT-NeoX and Llama, not
RoFormer's neighbours). At position p it is rotated by the angle p * f_i, with f_i = base^(-2i/D)
before scaling. In this file ``P`` is the D/2 pairs of a head, and frequencies are in radians per
token.

Positions are arguments, so a shard may hold any of them. The scaling depends on the length of the
whole sequence, never on that of a shard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every angle, (l, P) or (B, l, P) float32, computed once per forward."""

    cos_lP: torch.Tensor
    sin_lP: torch.Tensor


@dataclass(frozen=True)
class Rope:
    """The frequencies of one model.

    It has no tensors, so casting the model to bfloat16 does not affect it.
    scaling: a name of ``_SCALINGS``. factor: the new length divided by the old one.
    original_length: the old length in tokens, which only yarn and llama3 use.
    """

    head_dim: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: float = 0.0

    def rotation(self, positions_l: torch.Tensor) -> Rotation:
        """Compute cos and sin at ``positions_l``, (l,) or (B, l) int64, on their device.

        The angles are float64: at position 10^6 the error of a float32 angle is about 0.03 radians,
        that of a float64 one 10^-10.
        """
        angles_lP = positions_l.double().unsqueeze(-1) * self.frequencies(positions_l.device)
        cos_lP = angles_lP.cos() * self.magnitude
        sin_lP = angles_lP.sin() * self.magnitude
        return Rotation(cos_lP.float(), sin_lP.float())

    def frequencies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Compute the scaled radians per token of every pair: (P,) float64.

        They are computed on ``device``, so that nothing is copied to it.
        """
        pair_P = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        return _SCALINGS[self.scaling](self, self.base ** (-2 * pair_P / self.head_dim))

    @property
    def magnitude(self) -> float:
        """The factor of queries and of keys: sqrt(1/t), t the temperature of YaRN (section 3.4)."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0


def rotate(x_BlHD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate queries or keys to their positions: (B, l, H, D), in the dtype of ``x_BlHD``.

    The products are float32 for bfloat16 input, because cos and sin are; only the result is cast.
    """
    cos_l1P, sin_l1P = rotation.cos_lP.unsqueeze(-2), rotation.sin_lP.unsqueeze(-2)
    x_BlHP, y_BlHP = x_BlHD.chunk(2, dim=-1)
    rotated_BlHD = torch.cat(
        [x_BlHP * cos_l1P - y_BlHP * sin_l1P, y_BlHP * cos_l1P + x_BlHP * sin_l1P], dim=-1
    )
    return rotated_BlHD.type_as(x_BlHD)


def rotate_both(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions; libraries have one kernel for both (fused/)."""
    return rotate(q_BlHD, rotation), rotate(k_BlGD, rotation)


def _index(frequency_P: torch.Tensor) -> torch.Tensor:
    """Return 0, 1, ..., P - 1 with the dtype and device of ``frequency_P``."""
    return torch.arange(len(frequency_P), dtype=frequency_P.dtype, device=frequency_P.device)


def _none(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    return frequency_P


def _linear(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """Position Interpolation (Chen et al. 2023, section 2.3): divide positions by ``factor``."""
    return frequency_P / rope.factor


def _ntk(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling (bloc97 2023; Peng et al. 2023, section 3.1).

    The base becomes base * factor^(D / (D-2)). Per pair: the fastest keeps its frequency, that of
    the slowest is divided by ``factor``, and the divisors in between are geometric. The scaling
    that transformers calls dynamic, with a factor f, is this one at a fixed length, with the factor
    f * length / trained length - (f - 1).
    """
    share_P = _index(frequency_P) / max(len(frequency_P) - 1, 1)
    return frequency_P / rope.factor**share_P


def _yarn(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """YaRN's frequencies (Peng et al. 2023, section 3.2, NTK-by-parts): interpolate slow pairs.

    Pairs with 32 turns or more within the old length keep their frequency; those with one or fewer
    are interpolated. In between the blend is linear in the pair's index and its ends are whole
    pairs, as in the authors' code and in transformers; in the paper it is linear in the turns.
    """
    first = max(math.floor(_pair_with_turns(32, rope)), 0)
    last = min(math.ceil(_pair_with_turns(1, rope)), rope.head_dim - 1)
    interpolated_P = ((_index(frequency_P) - first) / max(last - first, 0.001)).clamp(0, 1)
    return torch.lerp(frequency_P, frequency_P / rope.factor, interpolated_P)


def _pair_with_turns(turns: float, rope: Rope) -> float:
    """Solve f_i * length = 2 pi turns for i, the real-valued index of a pair."""
    log_ratio = math.log(rope.original_length / (turns * 2 * math.pi))
    return rope.head_dim * log_ratio / (2 * math.log(rope.base))


def _llama3(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's scaling (Grattafiori et al. 2024, and the released code), by bands of wavelength.

    Pairs with 4 turns or more within the old length (``high_freq_factor``) keep their frequency,
    those with one or fewer (``low_freq_factor``) are interpolated, and in between the blend is
    linear in the number of turns.
    """
    turns_P = frequency_P * rope.original_length / (2 * math.pi)
    kept_P = ((turns_P - 1) / (4 - 1)).clamp(0, 1)
    return torch.lerp(frequency_P / rope.factor, frequency_P, kept_P)


_SCALINGS: dict[str, Callable[[Rope, torch.Tensor], torch.Tensor]] = {
    "none": _none,
    "linear": _linear,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
}
