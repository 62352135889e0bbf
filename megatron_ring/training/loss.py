"""The loss, by one rule: the sum of token losses over the number of tokens that count, of the whole global batch.

Ranks and micro-batches may hold unequal numbers of counted tokens, none included, so a mean of means is wrong. Each
micro-batch gives its local sum; the count is taken over all micro-batches and all data x context ranks before the
first backward. DeepSpeed averages gradients over its data axis (D x C) and over micro-batches, hence the factor.
"""

import torch
import torch.nn.functional as F

from megatron_ring.data.packing import IGNORED


def loss_sum(logits_BlV: torch.Tensor, targets_Bl: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies (nats, float32) of the tokens whose target is not IGNORED; 0 where there is none."""
    logits = logits_BlV.flatten(0, 1).float()
    return F.cross_entropy(logits, targets_Bl.flatten(), ignore_index=IGNORED, reduction="sum")


def counted_tokens(targets_Bl: torch.Tensor) -> torch.Tensor:
    """How many targets count: a scalar, int64."""
    return (targets_Bl != IGNORED).sum()


def share_of_mean(local_sum: torch.Tensor, global_count: torch.Tensor, averaged_over: int) -> torch.Tensor:
    """What to differentiate, so that a mean over ``averaged_over`` such shares is the true token mean.

    ``averaged_over`` is D x C x micro-batches of a step: what DeepSpeed divides by.
    """
    return local_sum * (averaged_over / global_count.clamp(min=1))
