"""One rule: summed token losses over the number of tokens that count, wherever they lie."""

import torch

from megatron_ring.training.loss import IGNORED, counted_tokens, loss_sum, share_of_mean

LOGITS = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([[1, 2, 3, IGNORED, 5, 6], [IGNORED, 8, 9, 10, 0, 1]])


def expected_mean() -> torch.Tensor:
    log_probability = LOGITS.float().log_softmax(-1)
    seen = [-log_probability[b, t, TARGETS[b, t]] for b in range(2) for t in range(6) if TARGETS[b, t] != IGNORED]
    return torch.stack(seen).mean()


def test_the_sum_over_the_count_is_the_mean_over_counted_tokens():
    torch.testing.assert_close(loss_sum(LOGITS, TARGETS) / counted_tokens(TARGETS), expected_mean())


def test_shares_of_uneven_ranks_average_to_the_token_mean():
    # Three ranks with 6, 4 and 0 counted tokens: a mean of their means would be wrong, or nan.
    parts = [(LOGITS[:, :4], TARGETS[:, :4]), (LOGITS[:, 4:], TARGETS[:, 4:])]
    parts.append((LOGITS[:, :2], torch.full((2, 2), IGNORED)))
    shares = [share_of_mean(loss_sum(*part), counted_tokens(TARGETS), averaged_over=3) for part in parts]
    torch.testing.assert_close(sum(shares) / 3, expected_mean())


def test_a_rank_whose_tokens_all_predict_nothing_gives_zero_and_zero_gradients():
    logits = LOGITS.clone().requires_grad_()
    nothing = torch.full((2, 6), IGNORED)
    share = share_of_mean(loss_sum(logits, nothing), counted_tokens(nothing), averaged_over=4)
    share.backward()
    assert share == 0
    assert (logits.grad == 0).all()
