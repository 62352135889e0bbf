"""A tile by the flash kernel for CUDA in torch's ``scaled_dot_product_attention``: rectangles and triangles.

In elements of two bytes. Written from the operators' schemas, to which the tests hold it, and never run on a GPU. Under
``torch.use_deterministic_algorithms`` it adds up in one order, by its source.
"""

import torch

aten = torch.ops.aten


def forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: None, scale: float):
    """As in ``Operator``."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMGD, v_BMGD))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM: None, scale: float
):
    """As in ``Operator``."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD))
    # Without dropout the random state is not read, and without packing neither are the cumulative lengths.
    no_lengths, no_random_state = None, torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse_BHL.contiguous(), no_lengths, no_lengths, q.shape[2], k.shape[2],
        0.0, causal, no_random_state, no_random_state, scale=scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in gradients)
