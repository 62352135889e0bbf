"""Targets as libraries' cross entropies may be given them: they read a row of logits wherever a target says."""

import math

import torch


def within_rows(
    target_c1: torch.Tensor, rows: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """target_c, with ``ignore_index`` for those that are no row, and what to add to the sum: infinity if there are any.

    Nothing is copied to the host.
    """
    target_c = target_c1.flatten()
    astray_c = (target_c != ignore_index) & ((target_c < 0) | (target_c >= rows))
    return torch.where(astray_c, ignore_index, target_c), torch.where(astray_c.any(), math.inf, 0.0)
