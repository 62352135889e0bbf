"""Stand-ins in torch for functions of flash-attn and Apex, with their parameters and rounding.

Written from flash-attn 2.8.3 and NVIDIA Apex at 014f30f and 8b19c3f, neither of which runs without
a GPU. What a kernel reads without looking at the strides is read that way.
"""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from tests.kernels.raw_memory import read_as_dense


def import_with_stand_ins(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict], wrapper: str
) -> ModuleType:
    """Import our module ``wrapper`` with stand-ins in ``modules``; ``monkeypatch`` removes both."""
    names = {module.rsplit(".", n)[0] for module in modules for n in range(module.count(".") + 1)}
    for name in names:
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    # Setting the entry first makes monkeypatch remove the module that is imported below.
    monkeypatch.setitem(sys.modules, wrapper, None)
    del sys.modules[wrapper]
    return importlib.import_module(wrapper)


def _normalized(x, weight, bias, eps, rms):
    x = x if rms else x - x.mean(-1, keepdim=True)
    scaled = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return scaled + (0 if bias is None else bias)


# ---- flash-attn ----


def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0
):
    parameters = (None if p is None else p.float() for p in (weight, bias))
    return _normalized(x.float(), *parameters, eps, rms=True).type_as(x)


def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0
):
    return _normalized(x.float(), weight.float(), bias.float(), eps, rms=False).type_as(x)


def apply_rotary_emb(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
    max_seqlen=None,
):  # fmt: skip
    seqlen_ro, half = cos.shape
    assert sin.shape == cos.shape
    assert x.shape[-1] == 2 * half <= 256
    assert seqlen_ro >= x.shape[1]
    cos, sin = cos[:, None].float(), sin[:, None].float()
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).type_as(x)


def swiglu(x, y, /):
    return (x.float() * y.float() / (1 + torch.exp(-x.float()))).type_as(x)


class _FlashCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, inplace_backward):
        n_cols = logits.shape[1]
        lse = logits.float().logsumexp(-1)
        counts = labels != ignore_index
        inside = (labels >= 0) & (labels < n_cols)
        own = logits.float().gather(1, torch.where(inside, labels, 0)[:, None])[:, 0]
        ctx.save_for_backward(logits, lse, labels)
        ctx.ignore_index, ctx.inplace_backward = ignore_index, inplace_backward
        # The loss of a label outside the columns is 0.
        return torch.where(counts & inside, lse - own, 0.0)

    @staticmethod
    def backward(ctx, grad_losses):
        logits, lse, labels = ctx.saved_tensors
        one_hot = torch.arange(logits.shape[1]) == labels[:, None]
        grads = torch.where(labels == ctx.ignore_index, 0.0, grad_losses)[:, None]
        dlogits = logits if ctx.inplace_backward else torch.empty_like(logits)
        dlogits.copy_(((logits.float() - lse[:, None]).exp() - one_hot.float()) * grads)
        return dlogits, None, None, None


def cross_entropy_loss(
    logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0,
    lse_square_scale=0.0, ignore_index=-100, inplace_backward=False, process_group=None,
):  # fmt: skip
    assert labels.shape == (len(logits),)
    labels = read_as_dense(labels)
    losses = _FlashCrossEntropy.apply(logits, labels, ignore_index, inplace_backward)
    return losses, torch.zeros_like(losses)


FLASH_ATTN = {
    "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
    "flash_attn.ops.activations": {"swiglu": swiglu},
    "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": cross_entropy_loss},
    "flash_attn.ops.triton.layer_norm": {
        "layer_norm_fn": layer_norm_fn,
        "rms_norm_fn": rms_norm_fn,
    },
}


# ---- NVIDIA Apex ----


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(normalized_shape) == weight.shape
    return functional.rms_norm(input.float(), weight.shape, None, eps).type_as(input) * weight


def fused_layer_norm_affine(
    input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False
):
    assert tuple(normalized_shape) == weight.shape
    normalized = functional.layer_norm(input.float(), weight.shape, None, None, eps)
    return normalized.type_as(input) * weight + bias


def fused_apply_rotary_pos_emb_cached(t, cos_, sin_, transpose_output_memory=False):
    assert cos_.shape == sin_.shape == (t.shape[0], 1, 1, t.shape[3])
    cos_, sin_ = read_as_dense(cos_), read_as_dense(sin_)
    first, second = t.chunk(2, -1)
    rotated = t * cos_.type_as(t) + torch.cat([-second, first], -1) * sin_.type_as(t)
    if transpose_output_memory:
        return rotated.transpose(0, 1).contiguous().transpose(0, 1)
    return rotated.contiguous()


APEX = {
    "apex.normalization.fused_layer_norm": {
        "fused_layer_norm_affine": fused_layer_norm_affine,
        "fused_rms_norm_affine": fused_rms_norm_affine,
    },
    "apex.transformer.functional.fused_rope": {
        "fused_apply_rotary_pos_emb_cached": fused_apply_rotary_pos_emb_cached
    },
    "fused_layer_norm_cuda": {},
    "fused_rotary_positional_embedding": {},
}
