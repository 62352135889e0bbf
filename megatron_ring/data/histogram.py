"""How long documents are: a count for each power of two, as text."""

import numpy as np

_WIDTH = 40


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(2^k, how many of ``lengths`` are 2^k to 2^(k+1) - 1), from the shortest to the longest; k = 0 counts 0 too."""
    # frexp is exact where a logarithm may land beside a power of two.
    powers = np.maximum(np.frexp(lengths.astype(np.float64))[1] - 1, 0)
    counts = np.bincount(powers)
    return [(1 << power, int(counts[power])) for power in range(int(powers.min()), len(counts))]


def drawn(lengths: np.ndarray) -> str:
    """The histogram, a line for each power of two with a bar beside it."""
    histogram = length_histogram(lengths)
    most = max(count for _, count in histogram)
    lines = (
        f"{size:>12,}  {count:>12,}  {'#' * round(_WIDTH * count / most)}"
        for size, count in histogram
    )
    return "\n".join(["tokens, from   documents", *(line.rstrip() for line in lines)])
