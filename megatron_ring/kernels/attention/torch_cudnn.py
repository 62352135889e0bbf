"""A tile by cuDNN's fused attention, as torch carries it: rectangles and triangles in elements of two bytes.

Its lse has a last dim of 1 (from torch 2.9 on). Some torch keep a plan by the strides of q, k and v alone and apply it
whatever out, dout and lse have: these come contiguous always. Written from torch's source, held by the tests to the
operators' schemas, and never run on a GPU.
"""

import torch

aten = torch.ops.aten


def forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: None, scale: float):
    """As in ``Operator``."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMGD, v_BMGD))
    out, lse_BHL1, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse_BHL1.squeeze(-1)


def backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM: None, scale: float
):
    """As in ``Operator``."""
    inputs = dout_BLHD.contiguous(), q_BLHD, k_BMGD, v_BMGD, out_BLHD.contiguous()
    dout, q, k, v, out = (x.transpose(1, 2) for x in inputs)
    # Without dropout the random state is not read, and without packing neither are the cumulative lengths.
    no_bias, no_lengths, no_seed = None, None, torch.empty((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse_BHL.contiguous().unsqueeze(-1), no_seed, no_seed, no_bias, no_lengths, no_lengths,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in gradients)
