"""Attention of one new token of each sample over a sharded cache.

Every rank computes the new token and attends to its own shard of the cache; the partial results are
merged by log-sum-exp.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.inference.cache import Cache
from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from megatron_ring.parallel.collectives import RingExchange, RingRank

CONVERTED_KEYS = 16384
"""Keys in half precision that are converted to float32 at a time when a token is decoded."""


class PartialSoftmax(NamedTuple):
    """Attention over one shard of the keys, in float32 (float64 for float64), not normalised.

    max_BH: the largest score of each query, -inf where there is no key. sum_BH: of the weights
    exp(score - max). out_BHD: the values times their weights.
    """

    out_BHD: torch.Tensor
    max_BH: torch.Tensor
    sum_BH: torch.Tensor

    def pack(self) -> torch.Tensor:
        """Return (..., D + 2): the weighted values, the sum of the weights and the maximum."""
        return torch.cat((self.out_BHD, self.sum_BH[..., None], self.max_BH[..., None]), dim=-1)


class DecodeStep:
    """Attention of one new token of each of ``samples``; the ownership has its position already.

    Every call of ``attend`` communicates over the ring and blocks. Two ranks exchange batch x local
    heads x (head dim + 2) numbers; more run two all-reduces, of batch x local heads numbers for the
    maximum, and of (head dim + 1) times as many for the sums. The result is the same on every rank.
    """

    def __init__(self, samples: Sequence[int], cache: Cache, ring: RingRank):
        self.samples = list(samples)
        self.cache = cache
        self.ring = ring
        self._entries: dict[int, list[int]] = {}

    def attend(
        self, layer: int, q_B1HD: torch.Tensor, k_B1GD: torch.Tensor, v_B1GD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new entries on their owner; return out_B1HD, in q's dtype, and lse_BH1."""
        self._store(layer, k_B1GD, v_B1GD)
        out_BHD, lse_BH = self.merge(self.attend_shard(layer, q_B1HD[:, 0]))
        return out_BHD.to(q_B1HD.dtype).unsqueeze(1), lse_BH.unsqueeze(-1)

    def attend_shard(self, layer: int, q_BHD: torch.Tensor) -> PartialSoftmax:
        """Attend to this rank's entries; does not communicate."""
        dtype = accumulation_dtype(q_BHD.dtype)
        partial = PartialSoftmax(
            q_BHD.new_zeros(q_BHD.shape, dtype=dtype),
            q_BHD.new_full(q_BHD.shape[:2], -torch.inf, dtype=dtype),
            q_BHD.new_zeros(q_BHD.shape[:2], dtype=dtype),
        )
        visible = self._visible_entries(layer)
        for row, (sample, entries) in enumerate(zip(self.samples, visible)):
            if entries:
                kv_2GMD = self.cache.layers[layer][sample].last(entries)
                for target, result in zip(partial, attend_to_all(q_BHD[row], *kv_2GMD)):
                    target[row] = result
        return partial

    def merge(self, own: PartialSoftmax) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out_BHD and lse_BH over the shards of all ranks.

        At least one rank has a key of every sample, so the maximum is finite, and a rank that has
        none adds zeros.
        """
        if self.ring.size == 2:
            merged = self._merge_of_both_ranks(own)
        else:
            merged = self._merge_by_all_reduces(own)
        return merged.out_BHD / merged.sum_BH.unsqueeze(-1), merged.max_BH + merged.sum_BH.log()

    def _merge_of_both_ranks(self, own: PartialSoftmax) -> PartialSoftmax:
        """Exchange partial results, and add both up in rank order, so that both ranks do alike.

        One exchange has half the messages of an all-reduce, of which there would be two.
        """
        packed = own.pack()
        received = self._exchange.start(packed).wait()
        in_order = [packed, received] if self.ring.rank == 0 else [received, packed]
        return merge_packed(torch.stack(in_order))

    def _merge_by_all_reduces(self, own: PartialSoftmax) -> PartialSoftmax:
        if self.ring.links is None:
            return own
        max_BH = own.max_BH.clone()
        dist.all_reduce(max_BH, dist.ReduceOp.MAX, self.ring.links[0])
        # (B, H, D + 1): the weighted values and, last, the sum of the weights.
        sums = own.pack()[..., :-1] * torch.exp(own.max_BH - max_BH).unsqueeze(-1)
        dist.all_reduce(sums, dist.ReduceOp.SUM, self.ring.links[0])
        return PartialSoftmax(sums[..., :-1], max_BH, sums[..., -1])

    @functools.cached_property
    def _exchange(self) -> RingExchange:
        return self.ring.exchange()

    def _store(self, layer: int, k_B1GD: torch.Tensor, v_B1GD: torch.Tensor) -> None:
        visible = self._visible_entries(layer)
        for row, (sample, entries) in enumerate(zip(self.samples, visible)):
            if (self.cache.lengths[sample] - 1) % self.ring.size == self.ring.rank:
                kv = self.cache.layers[layer][sample]
                kv.append(k_B1GD[row], v_B1GD[row], still_seen=entries - 1)

    def _visible_entries(self, layer: int) -> list[int]:
        """Return how many entries of this rank the new token of each sample sees, itself included.

        Layers with the same window share the result.
        """
        window = self.cache.shape.windows[layer]
        if window not in self._entries:
            lengths = [self.cache.lengths[sample] for sample in self.samples]
            self._entries[window] = [
                self.cache.ownership.count(sample, self.ring.rank, length - window if window else 0)
                for sample, length in zip(self.samples, lengths)
            ]
        return self._entries[window]


def attend_to_all(q_HD: torch.Tensor, k_GMD: torch.Tensor, v_GMD: torch.Tensor) -> PartialSoftmax:
    """Attend with one query, (H, D), to all M >= 1 keys; the results have no batch dimension.

    Scores and sums are float32. Keys and values in half precision are converted in parts of
    ``CONVERTED_KEYS``, so that no float32 copy of a whole cache exists.
    """
    if k_GMD.dtype == accumulation_dtype(q_HD.dtype):
        return _attend(q_HD, k_GMD, v_GMD)
    parts = zip(k_GMD.split(CONVERTED_KEYS, 1), v_GMD.split(CONVERTED_KEYS, 1))
    return merge_packed(torch.stack([_attend(q_HD, *part).pack() for part in parts]))


def _attend(q_HD: torch.Tensor, k_GMD: torch.Tensor, v_GMD: torch.Tensor) -> PartialSoftmax:
    """Compute ``attend_to_all`` at once.

    The queries of a group of heads are the rows of one product, so that every key is read once.
    """
    dtype = accumulation_dtype(q_HD.dtype)
    groups, _, head_dim = k_GMD.shape
    # X = H / G query heads, adjacent in q, read each key-value head.
    q_GXD = (q_HD.to(dtype) * head_dim**-0.5).view(groups, -1, head_dim)
    scores_GXM = torch.bmm(q_GXD, k_GMD.to(dtype).mT)
    max_GX = scores_GXM.amax(-1)
    weights_GXM = scores_GXM.sub_(max_GX.unsqueeze(-1)).exp_()
    out_GXD = torch.bmm(weights_GXM, v_GMD.to(dtype))
    return PartialSoftmax(out_GXD.view(q_HD.shape), max_GX.flatten(), weights_GXM.sum(-1).flatten())


def merge_packed(packed_PBHX: torch.Tensor) -> PartialSoftmax:
    """Merge P partial results, each as ``PartialSoftmax.pack`` returns it, added up in order.

    The maximum over them must be finite; one that has no keys adds zeros.
    """
    max_PBH = packed_PBHX[..., -1]
    max_BH = max_PBH.amax(0)
    sums = (packed_PBHX[..., :-1] * torch.exp(max_PBH - max_BH).unsqueeze(-1)).sum(0)
    return PartialSoftmax(sums[..., :-1], max_BH, sums[..., -1])
