"""Packs of documents whose lengths follow a histogram, such as that of a real corpus.

The file is CSV with the columns from, to and documents; lines that begin with # are comments. Bins
hold the lengths from, ..., to, both included. ``PUBLISHED`` is the histogram of 13.5 million
documents, of 1,782 tokens on average, with which MagiAttention is benchmarked.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.document_packs import starts_of
from megatron_ring.errors import DataError

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
