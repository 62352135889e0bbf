"""The options of tools/evaluate.py, beside those of the model (inference.py)."""

from dataclasses import dataclass
from typing import Literal

from megatron_ring.config.checks import negative, unusable_values

DocumentsKind = Literal["as-trained", "joined", "separated", "long"]


@dataclass(frozen=True)
class PositionsConfig:
    """Loss by position: the data, the lengths, and how documents form samples."""

    data_path: tuple[str, ...] = ()
    """Token store or blend, as in training. Empty: that of the run which wrote the checkpoint."""
    part: Literal["training", "validation", "test", "all"] = "validation"
    """Part of the documents, by the run's --split. all: every document of the store."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sample, one curve for each. Empty: the length that the model was trained on."""
    documents: tuple[DocumentsKind, ...] = ("as-trained",)
    """How documents form samples, one curve for each. as-trained: as in the run that wrote the
    checkpoint; joined: a token sees all earlier ones of its sample, of other documents too;
    separated: only those of its own document; long: a sample is the beginning of one document, of
    those that fill it, so every position is evaluated on the same documents."""
    samples: int = 0
    """Samples for each curve. 0: as many tokens as a validation of the run reads, that is its
    eval_iters global batches."""
    bucket_width: int = 0
    """Number of positions in a bucket. 0: buckets double: 1, 2, 3 to 4, 5 to 8 and so on."""
    output: str = "positions.json"
    """File for the results. The picture is written beside it, with the suffix .png."""

    def problems(self) -> list[str]:
        """Return all problems that do not depend on the model or the data."""
        if unusable := unusable_values(self):
            return unusable
        problems = negative(self, "samples", "bucket_width")
        for length in self.lengths:
            if length < 1:
                problems.append(
                    f"lengths has {length}, and each must be at least 1. Set --lengths."
                )
        for name in ("lengths", "documents"):
            values = getattr(self, name)
            if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
                problems.append(
                    f"{name} has {', '.join(repeated)} more than once, which would be the same "
                    f"curve again. Set --{name}."
                )
        if not self.documents:
            problems.append(
                "documents is empty, and there is no curve without it. Set --documents."
            )
        return problems
