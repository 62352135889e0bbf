"""What a ring sends: which of keys and queries is fewer bytes backward.

Backward, a rank may send on the keys it has or the queries it has. Keys carry V, dK and dV; queries carry dO, lse,
delta and dQ, for every query head instead of every key-value head. With equal heads the queries are less, and with
enough query heads to a key-value head the keys are.
"""

import torch

from megatron_ring.kernels.attention.state import accumulation_dtype


def backward_bytes(q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor) -> dict[str, int]:
    """What a rank sends in one hop of the backward pass where the keys travel, and where the queries do."""
    sums = accumulation_dtype(q_BLHD.dtype).itemsize
    rows = q_BLHD.shape[:-1].numel()
    return {
        "keys": kv_2BLGD.numel() * (kv_2BLGD.itemsize + sums),
        "queries": q_BLHD.numel() * (2 * q_BLHD.itemsize + sums) + rows * 2 * sums,
    }


def queries_are_lighter(q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor) -> bool:
    """Whether the queries are fewer bytes than the keys: in float32 below 4/3 query heads to a key-value head, in
    bfloat16 below 3/2, both but for lse and delta."""
    cost = backward_bytes(q_BLHD, kv_2BLGD)
    return cost["queries"] < cost["keys"]
