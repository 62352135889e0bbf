"""Packs of documents whose lengths follow a histogram, such as that of a real corpus.

The file is CSV with the columns from, to and documents; lines that begin with # are comments. Bins
hold the lengths from, ..., to, both included. ``PUBLISHED`` is the histogram of 13.5 million
documents, of 1,782 tokens on average, with which MagiAttention is benchmarked.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.document_packs import random_starts, starts_of
from megatron_ring.errors import ConfigError, DataError

PUBLISHED = Path(__file__).with_name("document_lengths.csv")
_COLUMNS = ["from", "to", "documents"]


@dataclass(frozen=True)
class Histogram:
    """Counts of documents by length: bins [shortest, longest], all fields (bins,) int64."""

    shortest: torch.Tensor
    longest: torch.Tensor
    documents: torch.Tensor

    def starts(self, seq_length: int, seed: int) -> tuple[int, ...]:
        """Return the first positions of random documents in a pack of ``seq_length`` tokens.

        A document's bin is drawn by the counts and its length evenly within the bin, at least 1;
        the last document is cut at the end of the pack. The result depends on the arguments alone.
        """
        generator = torch.Generator().manual_seed(seed)
        lengths: list[int] = []
        filled = 0
        while filled < seq_length:
            more = self._lengths(1024, generator)
            lengths += more
            filled += sum(more)
        return starts_of(lengths, seq_length)

    def lengths(self, number: int, seed: int) -> np.ndarray:
        """Return the lengths of so many random documents, (number,) int64; drawn as ``starts``."""
        return np.array(self._lengths(number, torch.Generator().manual_seed(seed)))

    def _lengths(self, number: int, generator: torch.Generator) -> list[int]:
        bins = torch.multinomial(self.documents.double(), number, True, generator=generator)
        sizes = self.longest[bins] - self.shortest[bins] + 1
        uniform = torch.rand(number, generator=generator, dtype=torch.float64)
        return (self.shortest[bins] + (uniform * sizes).long()).clamp(min=1).tolist()


def read_histogram(path: Path = PUBLISHED) -> Histogram:
    """Read a histogram; raises DataError if ``path`` is not one, with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the histogram {path}: {error}.") from error
    numbered = [(n, row) for n, row in enumerate(lines, 1) if row and not row.startswith("#")]
    rows = [(n, next(csv.reader([row]))) for n, row in numbered]
    if not rows or rows[0][1] != _COLUMNS:
        raise DataError(f"{path} is not a histogram: its columns must be {','.join(_COLUMNS)}.")
    bins = [_bin(path, n, row) for n, row in rows[1:]]
    if not sum(documents for _, _, documents in bins):
        raise DataError(f"the histogram {path} counts no documents.")
    return Histogram(*torch.tensor(bins).unbind(1))


def pack_starts(documents: str, seq_length: int, samples: int = 1) -> tuple[int, ...]:
    """Return where documents begin in ``samples`` packs laid end to end.

    ``documents`` is a mean length, for lognormal lengths; equal:N, for lengths of N; or
    histogram:FILE, for lengths drawn from the file, histogram for the published one. Raises
    ConfigError for anything else, and DataError for a file that is not a histogram.
    """
    kind, _, value = documents.partition(":")
    if kind == "histogram":
        histogram = read_histogram(Path(value) if value else PUBLISHED)
        of_samples = [histogram.starts(seq_length, seed) for seed in range(samples)]
        return tuple(s * seq_length + start for s, pack in enumerate(of_samples) for start in pack)
    number = value if kind == "equal" else documents
    if not (number.isascii() and number.isdigit() and int(number)):
        raise ConfigError(
            f"documents {documents} must be a mean length of at least 1, equal:LENGTH, histogram "
            "or histogram:FILE. Set --documents."
        )
    if kind != "equal":
        return random_starts(int(number), seq_length, samples)
    starts = range(0, seq_length, int(number))
    return tuple(s * seq_length + start for s in range(samples) for start in starts)


def _bin(path: Path, line: int, row: list[str]) -> list[int]:
    try:
        shortest, longest, documents = (int(cell) for cell in row)
        is_right = 0 <= shortest <= longest and longest >= 1 and documents >= 0
    except ValueError:
        is_right = False
    if not is_right:
        raise DataError(
            f"{path}, line {line}: {','.join(row)} is not a bin. A bin is three whole numbers: "
            "from, to (at least from and 1) and documents (at least 0)."
        )
    return [shortest, longest, documents]
