"""The ``data`` section: token stores, splits, and how documents form samples."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megatron_ring.errors import not_positive

_MAX_WEIGHT_CHARACTERS = 100


def parse_shares(given: str | list[Any]) -> tuple[float, ...]:
    """Parse --split: shares in separate words or, as in Megatron, separated by commas.

    Raises ValueError.
    """
    if not isinstance(given, str | list):
        raise ValueError("expected a list of numbers, or text with commas between them")
    words = given.split(",") if isinstance(given, str) else given
    parts = [part for word in words for part in str(word).split(",") if part.strip()]
    if len(parts) not in (2, 3):
        raise ValueError("expected two or three shares: training, validation and test")
    return tuple(map(float, parts))


_SHARES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="SHARE SHARE [SHARE]",
    instance_from_str=parse_shares,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [f"{share:g}" for share in value],
)


@dataclass(frozen=True)
class DataConfig:
    """Token stores, splits, and how documents form samples."""

    data_path: tuple[str, ...] = ()
    """Token store P, that is the files P.bin and P.idx in Megatron's format, or a blend: stores
    that each follow their weight, as in 0.7 A 0.3 B (in YAML weights are text too). Empty: the
    source code of Python's standard library."""
    tokenizer_model: str = ""
    """Tokenizer that the stores were written with: a sentencepiece model or a tokenizer.json.
    Empty: the one beside the first store."""
    split: Annotated[tuple[float, float] | tuple[float, float, float], _SHARES] = (0.98, 0.02)
    """Shares of the documents, in store order, for training, validation and optionally a test. Each
    store of a blend is split alike. The test is evaluated once, after the last step, whatever
    --eval-interval is. Shares may have any sum: 969,30,1 is 0.969 0.03 0.001. A share of 0 leaves
    its part out."""
    seq_length: int = 1024
    """Sequence length S of a sample, in tokens, before it is split over the context ranks."""
    packing: Literal["concatenate", "greedy", "best-fit", "balanced"] = "concatenate"
    """How documents fill samples. concatenate: split at the sample's end; greedy: whole documents
    by next fit; best-fit: whole documents by best-fit decreasing; balanced: whole documents so that
    samples have even attention work. Documents longer than a sample are split in any case."""
    reset_attention_mask: bool = False
    """Restrict attention to a token's own document, which ends with its end-of-document token."""
    reset_position_ids: bool = False
    """Restart position ids at 0 with each document."""
    eod_mask_loss: bool = False
    """Exclude the predictions of end-of-document tokens from the loss, so that no loss crosses from
    one document to the next."""

    sample_assignment: Literal["in-order", "by-work"] = "in-order"
    """Which data rank trains which sample of a step. in-order: as they come; by-work: so that the
    ranks have about the same attention work, which depends on the lengths of documents. The samples
    of a step stay the same. Needs --reset-attention-mask."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        problems = not_positive(self, "seq_length")
        if self.sample_assignment == "by-work" and not self.reset_attention_mask:
            problems.append(
                "sample_assignment by-work evens out the attention work of separate documents, but "
                "reset_attention_mask is off, so all samples have the same. Set "
                "--reset-attention-mask, or --sample-assignment in-order."
            )
        are_numbers = all(share >= 0 for share in self.split) and sum(self.split) < math.inf
        if not (are_numbers and self.split[0] > 0):
            problems.append(
                f"split {self.split} must be two or three shares (training, validation, test) that "
                "are at least 0, the first above 0. Set --split."
            )
        return problems + self._blend_problems()

    @property
    def shares(self) -> tuple[float, ...]:
        """The split, normalized unless its sum is 1."""
        if self.split_adds_up_to_1:
            return self.split
        return tuple(share / sum(self.split) for share in self.split)

    @property
    def split_adds_up_to_1(self) -> bool:
        """Whether the sum of the split is 1, up to the rounding of decimal fractions."""
        return abs(sum(self.split) - 1) <= 1e-6

    @property
    def blend(self) -> dict[str, Fraction]:
        """The exact weight of each token store, by its prefix; weights may have any sum."""
        if len(self.data_path) == 1:
            return {self.data_path[0]: Fraction(1)}
        weights = self.data_path[::2]
        prefixes = self.data_path[1::2]
        return {prefix: Fraction(weight) for weight, prefix in zip(weights, prefixes)}

    def _blend_problems(self) -> list[str]:
        count = len(self.data_path)
        weights = self.data_path[::2]
        prefixes = self.data_path[1::2]
        for prefix in prefixes or self.data_path:
            if not Path(prefix).name:
                return [
                    f"data_path has {prefix!r}, which is not the P of a token store P.bin. "
                    "Set --data-path."
                ]
        if count < 2:
            return []
        if count % 2:
            return [
                f"data_path has {count} words: expected one store, or stores that each follow "
                "their weight, as in 0.7 A 0.3 B, an even number of words. Set --data-path."
            ]
        problems = [
            f"data_path has {weight!r} before {prefix}, where a weight above 0 is expected. "
            "Set --data-path."
            for weight, prefix in zip(weights, prefixes)
            if not _is_weight(weight)
        ]
        for prefix in dict.fromkeys(prefixes):
            times = prefixes.count(prefix)
            if times > 1:
                problems.append(
                    f"data_path has {prefix} {times} times: add up its weights. Set --data-path."
                )
        return problems


def _is_weight(word: str) -> bool:
    """Return whether the word is a number above 0 and, with an exponent, in a float's range."""
    # Fraction computes 10**e, which takes hours and all memory for 1e999999999.
    try:
        if len(word) > _MAX_WEIGHT_CHARACTERS:
            return False
        if "e" in word.lower() and not 0 < float(word) < math.inf:
            return False
        return Fraction(word) > 0
    except (ValueError, ZeroDivisionError):
        return False
