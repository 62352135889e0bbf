"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2.2) and the ways to stretch it to longer contexts.

Pair i of a head is its elements i and i + D/2 (the halves of GPT-NeoX and Llama, not RoFormer's neighbours). At
position p it is turned by the angle p * f_i, with f_i = base^(-2i/D) before stretching. In this file ``P`` is the
D/2 pairs of a head, and frequencies are in radians per token.

Nothing here counts tokens: positions are given, so a shard may hold any of them, and the stretch follows from the
lengths of the whole sequence, never of a shard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every angle, (l, P) or (B, l, P) float32: made once a forward, used by every layer."""

    cos_lP: torch.Tensor
    sin_lP: torch.Tensor


@dataclass(frozen=True)
class Rope:
    """The angles of one model. It holds numbers and no tensor, so casting the model to bfloat16 cannot touch them.

    ``scaling`` is a name of ``_SCALINGS``, ``factor`` the new length over the old one, and ``original_length`` the old
    one in tokens, which yarn and llama3 alone read.
    """

    head_dim: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: float = 0.0

    def rotation(self, positions_l: torch.Tensor) -> Rotation:
        """cos and sin at ``positions_l``, (l,) or (B, l) int64, on their device.

        The angles are float64: at position 10^6 a float32 angle is off by some 0.03 radians, a float64 one by 10^-10.
        """
        angles_lP = positions_l.double().unsqueeze(-1) * self.frequencies(positions_l.device)
        cos_lP, sin_lP = angles_lP.cos() * self.magnitude, angles_lP.sin() * self.magnitude
        return Rotation(cos_lP.float(), sin_lP.float())

    def frequencies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Radians per token of every pair, stretched: (P,) float64, made on ``device`` so that nothing is copied."""
        pair_P = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        return _SCALINGS[self.scaling](self, self.base ** (-2 * pair_P / self.head_dim))

    @property
    def magnitude(self) -> float:
        """What queries and keys are each multiplied by: sqrt(1/t), t the softmax temperature of YaRN (section 3.4)."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0


def rotate(x_BlHD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Queries or keys turned to their positions: (B, l, H, D), in the dtype of ``x_BlHD``.

    The products are float32 for bfloat16 input, because cos and sin are; only the result is cast.
    """
    cos_l1P, sin_l1P = rotation.cos_lP.unsqueeze(-2), rotation.sin_lP.unsqueeze(-2)
    x_BlHP, y_BlHP = x_BlHD.chunk(2, dim=-1)
    turned_BlHD = torch.cat(
        [x_BlHP * cos_l1P - y_BlHP * sin_l1P, y_BlHP * cos_l1P + x_BlHP * sin_l1P], dim=-1
    )
    return turned_BlHD.type_as(x_BlHD)


def rotate_both(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned to their positions; what other libraries do in one kernel (fused/)."""
    return rotate(q_BlHD, rotation), rotate(k_BlGD, rotation)


def _index(frequency_P: torch.Tensor) -> torch.Tensor:
    """0, 1, ..., P - 1, of the same kind as ``frequency_P``."""
    return torch.arange(len(frequency_P), dtype=frequency_P.dtype, device=frequency_P.device)


def _none(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    return frequency_P


def _linear(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """Position Interpolation (Chen et al. 2023, section 2.3): every position over ``factor``."""
    return frequency_P / rope.factor


def _ntk(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """NTK-aware (bloc97 2023; Peng et al. 2023, section 3.1): base becomes base * factor^(D / (D-2)).

    Written per pair: the fastest keeps its frequency, the slowest has it divided by ``factor``, geometric in between.
    What transformers calls dynamic, with a factor f, is this at one length: f * length / trained length - (f - 1).
    """
    share_P = _index(frequency_P) / max(len(frequency_P) - 1, 1)
    return frequency_P / rope.factor**share_P


def _yarn(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """YaRN's frequencies (Peng et al. 2023, section 3.2, NTK-by-parts): fast pairs stay, slow ones are interpolated.

    Fast is 32 turns within the old length, slow is one. Between them the blend is linear in the pair's index and its
    ends are whole pairs, as in the authors' code and in transformers; the paper has it linear in the turns.
    """
    first, last = (_pair_that_turns(turns, rope) for turns in (32, 1))
    first, last = max(math.floor(first), 0), min(math.ceil(last), rope.head_dim - 1)
    interpolated_P = ((_index(frequency_P) - first) / max(last - first, 0.001)).clamp(0, 1)
    return torch.lerp(frequency_P, frequency_P / rope.factor, interpolated_P)


def _pair_that_turns(turns: float, rope: Rope) -> float:
    """The pair, as a real number, that turns ``turns`` times within the old length: f_i * length = 2 pi turns."""
    return (
        rope.head_dim
        * math.log(rope.original_length / (turns * 2 * math.pi))
        / (2 * math.log(rope.base))
    )


def _llama3(rope: Rope, frequency_P: torch.Tensor) -> torch.Tensor:
    """Llama 3.1 (Grattafiori et al. 2024, and the released code): bands of wavelength.

    Pairs that turn 4 times within the old length (``high_freq_factor``) stay, those that turn once or less
    (``low_freq_factor``) are interpolated, and between the two the blend is linear in the number of turns.
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
