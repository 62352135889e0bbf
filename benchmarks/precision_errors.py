"""Errors of ring attention relative to float64: for families of inputs, and in rings that round."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.emulated_ring import Attention, attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, HopKernel, reference
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax, zero_accumulators
from megatron_ring.model.attention import with_sink

GRADIENTS = ("dq", "dk", "dv")


def layout_of(layout: str, seq_length: int, ring_size: int) -> Layout:
    """Return the layout, or "none" on a single rank."""
    return Layout(layout if ring_size > 1 else "none", seq_length, ring_size)


def relative_errors(actual: Attention, exact: Attention) -> list[float]:
    """Return for each tensor the RMS of the difference over the RMS of the exact value."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, exact)]


# ---- families of inputs ----


@dataclass(frozen=True)
class InputFamily:
    """A distribution of q, k, v and the gradient of the output.

    Attributes:
        gradient: Gradient of the output: standard normal, 1, 1 / its size, or 1 in one element of
            each head.
        positive: q, k and v are absolute values of standard normal numbers.
        window: Queries see at most a quarter of the sequence.
        sinks: Each head has an attention sink, whose gradient comes through the log-sum-exp.
    """

    gradient: Literal["random", "constant", "mean", "one-hot"] = "random"
    positive: bool = False
    heads: int = 2
    kv_heads: int = 1
    window: bool = False
    sinks: bool = False

    def inputs(
        self, tokens: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
    ) -> list[torch.Tensor]:
        """Return q, k, v and the gradient of the output, each (1, tokens, heads, head_dim).

        The same arguments give the same tensors.
        """
        generator = torch.Generator().manual_seed(1)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        *qkv, dout = (torch.randn(1, tokens, h, head_dim, generator=generator) for h in heads)
        if self.positive:
            qkv = [x.abs() for x in qkv]
        dout = self._output_gradient(dout, generator)
        return [x.to(device, dtype) for x in (*qkv, dout)]

    def _output_gradient(
        self, normal_BSHD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the gradient of this family, given standard normal numbers of its shape."""
        match self.gradient:
            case "constant":
                return torch.ones_like(normal_BSHD)
            case "mean":
                return torch.full_like(normal_BSHD, 1 / normal_BSHD.numel())
            case "one-hot":
                *rows, head_dim = normal_BSHD.shape
                index_BSH = torch.randint(head_dim, rows, generator=generator)
                return torch.nn.functional.one_hot(index_BSH, head_dim)
            case _:
                return normal_BSHD

    def mask(self, tokens: int) -> Mask:
        return Mask(window_size(tokens)) if self.window else Mask()

    def then(self, tokens: int, device: str = "cpu") -> Callable[..., torch.Tensor] | None:
        """Return the sinks as the ``then`` of ``emulated_ring.attention``, None without sinks."""
        if not self.sinks:
            return None
        sink_H = torch.full((self.heads,), sink_score(tokens), device=device)
        return functools.partial(with_sink, sink_H=sink_H)

    def exact(
        self, tokens: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
    ) -> Attention:
        """Return attention in float64 of these inputs, which are first rounded to ``dtype``."""
        inputs = [x.double() for x in self.inputs(tokens, head_dim, dtype, device)]
        layout = Layout("none", tokens, 1)
        then = self.then(tokens, device)
        return attention(inputs, layout, reference, self.mask(tokens), then=then)


FAMILIES = {
    "random": InputFamily(),
    "constant gradient": InputFamily("constant"),
    "mean gradient": InputFamily("mean"),
    "one-hot gradient": InputFamily("one-hot"),
    "positive": InputFamily(positive=True),
    "positive, constant gradient": InputFamily("constant", positive=True),
    "positive, mean gradient": InputFamily("mean", positive=True),
    "positive, one-hot gradient": InputFamily("one-hot", positive=True),
    "8 query heads, 1 key-value head": InputFamily(heads=8, kv_heads=1),
    "2 query heads, 2 key-value heads": InputFamily(heads=2, kv_heads=2),
    "window": InputFamily(window=True),
    "window, positive, constant gradient": InputFamily("constant", positive=True, window=True),
    "sinks": InputFamily(sinks=True),
    "sinks, positive, constant gradient": InputFamily("constant", positive=True, sinks=True),
}


def window_size(tokens: int) -> int:
    """Return the tokens of the window of a family with one."""
    return max(2, tokens // 4)


def sink_score(tokens: int) -> float:
    """Return a sink score that dominates rows with few keys and is small beside long ones."""
    return math.log(tokens) - 1


@dataclass(frozen=True)
class FamilyErrors:
    """Relative errors by the name of a tensor.

    Attributes:
        alone: On one rank.
        keys: On the ring, with keys travelling in the backward pass.
        queries: On the ring, with queries travelling in the backward pass.
    """

    alone: dict[str, float]
    keys: dict[str, float]
    queries: dict[str, float]

    def growth(self, gradient: str) -> float:
        """Return the larger error on the ring over the error on one rank."""
        return max(self.keys[gradient], self.queries[gradient]) / self.alone[gradient]

    @property
    def largest_growth(self) -> float:
        return max(map(self.growth, GRADIENTS))


def family_errors(
    family: InputFamily,
    layouts: Sequence[Layout],
    kernel: HopKernel,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> FamilyErrors:
    """Return the errors of ``kernel`` in two ``layouts`` of one length: one rank and a ring."""
    small, large = layouts
    tokens = small.seq_length
    inputs = family.inputs(tokens, head_dim, dtype, device)
    exact = family.exact(tokens, head_dim, dtype, device)
    mask = family.mask(tokens)
    then = family.then(tokens, device)

    def errors(layout: Layout, queries_travel: bool) -> dict[str, float]:
        actual = attention(inputs, layout, kernel, mask, queries_travel, then)
        return dict(zip(Attention._fields, relative_errors(actual, exact)))

    return FamilyErrors(errors(small, False), errors(large, False), errors(large, True))


# ---- rings that round ----


@dataclass(frozen=True)
class MergingKernel:
    """Wraps a kernel and rounds its running output and gradients to the inputs' dtype."""

    kernel: HopKernel

    def forward(self, inputs: HopInputs, state) -> None:
        self.kernel.forward(inputs, state)
        _round(state.out_BLHD, inputs.q_BLHD.dtype)

    def backward(self, inputs: HopInputs, dout_BLHD, out, lse_BHL, accumulators) -> None:
        self.kernel.backward(inputs, dout_BLHD, out, lse_BHL, accumulators)
        for gradient in accumulators:
            _round(gradient, inputs.q_BLHD.dtype)


@dataclass(frozen=True)
class RoundedHops:
    """Wraps a kernel and rounds the results of each hop to the inputs' dtype before adding them."""

    kernel: HopKernel

    def forward(self, inputs: HopInputs, state: RunningSoftmax) -> None:
        hop = RunningSoftmax.empty(inputs.q_BLHD)
        self.kernel.forward(inputs, hop)
        _round(hop.out_BLHD, inputs.q_BLHD.dtype)
        state.merge(slice(0, inputs.q_BLHD.shape[1]), hop.out_BLHD, hop.lse_BHL)

    def backward(self, inputs: HopInputs, dout_BLHD, out, lse_BHL, accumulators) -> None:
        hop = GradientAccumulators(*map(zero_accumulators, inputs[:3]))
        self.kernel.backward(inputs, dout_BLHD, out, lse_BHL, hop)
        for total, gradient in zip(accumulators, hop):
            _round(gradient, inputs.q_BLHD.dtype)
            total += gradient


def _round(x: torch.Tensor, dtype: torch.dtype) -> None:
    """Round ``x`` in place to the precision of ``dtype``."""
    x.copy_(x.to(dtype))
