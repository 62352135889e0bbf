"""One rule: summed token losses over the number of tokens that count, wherever they lie."""

import torch

from megatron_ring.data.packing import IGNORED
from megatron_ring.engine.loss import counted_tokens, share_of_mean
from megatron_ring.kernels.cross_entropy import head_loss_sum

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 6, 4, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.randn(11, 4, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.tensor([[1, 2, 3, IGNORED, 5, 6], [IGNORED, 8, 9, 10, 0, 1]])


def expected_mean() -> torch.Tensor:
    log_probability = (HIDDEN @ WEIGHT.T).log_softmax(-1)
    seen = [
        -log_probability[b, t, TARGETS[b, t]]
        for b in range(2)
        for t in range(6)
        if TARGETS[b, t] != IGNORED
    ]
    return torch.stack(seen).mean()


def test_the_sum_over_the_count_is_the_mean_over_counted_tokens():
    mean = head_loss_sum(HIDDEN, WEIGHT, TARGETS) / counted_tokens(TARGETS)
    torch.testing.assert_close(mean, expected_mean())


def test_shares_of_uneven_ranks_average_to_the_token_mean():
    # Three ranks with 6, 4 and 0 counted tokens: a mean of their means would be wrong, or nan.
    parts = [(HIDDEN[:, :4], TARGETS[:, :4]), (HIDDEN[:, 4:], TARGETS[:, 4:])]
    parts.append((HIDDEN[:, :2], torch.full((2, 2), IGNORED)))
    scale = share_of_mean(counted_tokens(TARGETS), averaged_over=3)
    shares = [head_loss_sum(hidden, WEIGHT, targets) * scale for hidden, targets in parts]
    torch.testing.assert_close(sum(shares) / 3, expected_mean())


def test_a_rank_whose_tokens_all_predict_nothing_gives_zero_and_zero_gradients():
    hidden, nothing = HIDDEN.clone().requires_grad_(), torch.full((2, 6), IGNORED)
    share = head_loss_sum(hidden, WEIGHT, nothing) * share_of_mean(
        counted_tokens(nothing), averaged_over=4
    )
    share.backward()
    assert share == 0
    assert (hidden.grad == 0).all()
