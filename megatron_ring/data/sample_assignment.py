"""Which data rank trains which sample of a step, so that all have about the same attention work.

Samples of one length differ in the work of attention if documents are kept apart: a sample of one
document has many times that of a pack of short ones. A step takes as long as its slowest data rank.
Exchanging samples within the step changes neither the step's samples nor, except for the order of
additions, its loss and its gradients. The lengths of documents are known from the store's index, so
every rank computes the same assignment without reading tokens and without communication.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class DataImbalance(NamedTuple):
    """Attention work of the data rank with the most in a step, over the mean of the data ranks.

    assigned: with the samples that the ranks have. in_order: if they were assigned in their order.
    """

    assigned: float
    in_order: float


def visible_pairs(document_lengths: ArrayLike, window: int = 0) -> int:
    """Return the (query, key) pairs of causal attention within documents of these lengths.

    ``window`` as in ``Mask``; 0 for none.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    seen_by_last = np.minimum(lengths, window) if window else lengths
    in_triangle = seen_by_last * (seen_by_last + 1) // 2
    return int((in_triangle + (lengths - seen_by_last) * seen_by_last).sum())


def in_order(samples: int) -> np.ndarray:
    """Return the assignment that keeps the order of the stream; see ``by_work``."""
    return np.arange(samples)


def by_work(work_G: np.ndarray, data_size: int, micro_batch_size: int) -> np.ndarray:
    """Return which of G samples is in each slot of a step: (G,) int64, a permutation.

    Slots are those of ``Loader``: micro-batch, then data rank, then row. Samples are sorted by
    their work, and each run of ``data_size`` goes to the same row of one micro-batch, the most work
    to the rank with the least so far. So ranks are even in every micro-batch, where some kinds of
    ZeRO wait for each other, and over the step.
    """
    sorted_KD = np.argsort(-work_G, kind="stable").reshape(-1, data_size)
    load_D = np.zeros(data_size)
    assigned_KD = np.empty_like(sorted_KD)
    for number, samples_D in enumerate(sorted_KD):
        ranks_D = np.argsort(load_D, kind="stable")
        assigned_KD[number, ranks_D] = samples_D
        load_D[ranks_D] += work_G[samples_D]
    # (micro-batches, rows, data ranks) -> (micro-batches, data ranks, rows)
    return assigned_KD.reshape(-1, micro_batch_size, data_size).swapaxes(1, 2).flatten()


def imbalance(
    work_G: np.ndarray, slots_G: np.ndarray, data_size: int, micro_batch_size: int
) -> float:
    """Return the work of the data rank with the most over the mean, for an assignment."""
    load_D = work_G[slots_G].reshape(-1, data_size, micro_batch_size).sum((0, 2))
    return float(load_D.max() / load_D.mean())
