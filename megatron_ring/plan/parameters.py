"""How many parameters a process holds: its pipeline stage's layers, split over its tensor ranks.

Split are the heads of queries, keys and values, the output projection, the feed-forward's matrices
and the rows of the vocabulary (Shoeybi et al. 2019, section 3). Every tensor rank has all norms,
the biases that are added after a sum over the ranks, and a learned position table. Where a size
does not divide, the count is that of the first rank, which has the most.
"""

from megatron_ring.config import ModelConfig
from megatron_ring.model.shapes import element_count, stage_shapes
from megatron_ring.parallel.grid import Grid


def share(whole: int, ranks: int) -> int:
    """Return the largest part of ``whole`` that one of ``ranks`` has."""
    return -(-whole // ranks)


def parameter_count(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Return the number of parameters of the whole model, with tied ones counted once."""
    return element_count(stage_shapes(model, vocab_size, seq_length))


def parameters_of_stage(
    model: ModelConfig, vocab_size: int, seq_length: int, grid: Grid, stage: int
) -> int:
    """Return the number of parameters of a process on pipeline stage ``stage``."""
    shapes = stage_shapes(model, vocab_size, seq_length, grid.tensor, grid.pipe, stage)
    return element_count(shapes)
