"""The loss, by one rule: the sum of token losses over the number of tokens that count, of the whole global batch.

Ranks and micro-batches may hold unequal numbers of counted tokens, none included, so a mean of means is wrong. Each
micro-batch gives its local sum (model/gpt.py); the count is taken over all micro-batches and all data x context ranks
before the first backward. DeepSpeed averages gradients over its data axis (D x C) and over micro-batches, hence the
factor. Tensor ranks and pipeline stages share a loss and are counted once.
"""

import torch

from megatron_ring.data.packing import IGNORED


def counted_tokens(targets_Bl: torch.Tensor) -> torch.Tensor:
    """How many targets count: a scalar, int64."""
    return (targets_Bl != IGNORED).sum()


def share_of_mean(global_count: torch.Tensor, averaged_over: int) -> torch.Tensor:
    """What to multiply local sums by, so that a mean over ``averaged_over`` such shares is the true token mean.

    ``averaged_over`` is D x C x micro-batches of a step: what DeepSpeed divides by.
    """
    return averaged_over / global_count.clamp(min=1)
