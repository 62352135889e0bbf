"""One hop with Dao's flash-attn: the first of its versions 3, 4 and 2 that supports the run.

Its packed ("varlen") functions compute the tiles that need no mask, many tiles in one call
(varlen.py): each document of a striped pack is a triangle, whatever its length, and a sliding
window of consecutive tokens is the window of the function. The remaining tiles, where a window or a
document crosses edges of wide stripes, use torch's memory-efficient operator. flash-attn has the
same memory layout, (tokens, heads, head dim) with grouped heads, so nothing is transposed.

All versions return outputs and gradients of one call in the dtype of the queries; they are merged
and accumulated in float32. Attention sinks are not passed to the functions: they would count once
for each hop, so the model applies them to the merged output.

Under ``torch.use_deterministic_algorithms`` gradients are accumulated in a fixed order. The tests
use stand-ins with the parameters of all versions, and compile the calls of version 4 with the
library itself; no version has run on a GPU.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

from megatron_ring.kernels.attention.hop_kernel import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax, output_of
from megatron_ring.kernels.attention.tiled_kernel import TiledKernel
from megatron_ring.kernels.attention.tiles import TileKind, Tiling, Window
from megatron_ring.kernels.attention.torch_operators import CUDA_EFFICIENT
from megatron_ring.kernels.attention.varlen import VarlenCall
from megatron_ring.kernels.memory_contract import HALF_PRECISION, Memory, VendorOperator
from megatron_ring.kernels.selection import Unsupported

_TILING = Tiling(rows=1024, split_triangles=False, split_documents=True, sliding_windows=True)
_CAUSAL = Window(right=0)
_MASKED_TILES = TiledKernel(
    _TILING, lambda tile: CUDA_EFFICIENT if tile.kind is TileKind.MASKED else None
)


def forward(inputs: HopInputs, state: RunningSoftmax) -> None:
    """As in ``HopKernel``."""
    q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
    batch, library = len(q_BLHD), _library(q_BLHD)
    for call in key_ranges.varlen_calls(_TILING):
        q, k, v = q_BLHD[:, call.queries], k_BLGD[:, call.keys], v_BLGD[:, call.keys]
        out, lse = library.forward(
            *map(_end_to_end, (q, k, v)), *_sequences(key_ranges, call, q), scale
        )
        lse_BHL = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        # Version 2 returns +inf for a row that sees nothing, which would dominate every merge.
        lse_BHL = lse_BHL.masked_fill(lse_BHL == torch.inf, -torch.inf)
        state.merge(call.queries, out.unflatten(0, (batch, -1)), lse_BHL)
    _MASKED_TILES.forward(inputs, state)


def backward(
    inputs: HopInputs,
    dout_BLHD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    accumulators: GradientAccumulators,
) -> None:
    """As in ``HopKernel``."""
    q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
    tensors = (dout_BLHD, q_BLHD, k_BLGD, v_BLGD, output_of(out))
    library = _library(q_BLHD)
    deterministic = torch.are_deterministic_algorithms_enabled()
    for call in key_ranges.varlen_calls(_TILING):
        rows, keys = call.queries, call.keys
        spans = (rows, rows, keys, keys, rows)
        packed = [_end_to_end(x[:, span]) for x, span in zip(tensors, spans)]
        lse_HT = lse_BHL[:, :, rows].transpose(0, 1).flatten(1)
        gradients = library.backward(
            *packed, lse_HT, *_sequences(key_ranges, call, q_BLHD), scale, deterministic
        )
        for total, span, gradient in zip(accumulators, (rows, keys, keys), gradients):
            total[:, span] += gradient.unflatten(0, (len(q_BLHD), -1))
    _MASKED_TILES.backward(inputs, dout_BLHD, out, lse_BHL, accumulators)


def _end_to_end(x_BLHD: torch.Tensor) -> torch.Tensor:
    """Concatenate samples, (B * L, H, D); only a slice of several samples is copied."""
    return x_BLHD.flatten(0, 1)


def _sequences(
    key_ranges: KeyRanges, call: VarlenCall, q: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int], Window]:
    """Return cu_seqlens (2, sequences + 1), the longest sequences, and what each query sees."""
    return key_ranges.cu_seqlens(call, len(q), q.device), call.longest, call.window


# ---- the versions ----


@dataclass(frozen=True)
class VarlenFunctions:
    """The packed functions of one version, imported when first called, because they load CUDA.

    T and U are the query and key tokens of a call, all sequences end to end.

    forward: (q_THD, k_UGD, v_UGD, cu_seqlens, longest, window, scale) -> (out_THD, lse_HT in
        float32; -inf or +inf where a query sees nothing).
    backward: (dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, cu_seqlens, longest, window, scale,
        deterministic) -> (dq_THD, dk_UGD, dv_UGD), from the final ``out`` and ``lse``.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., Sequence[torch.Tensor]]


# flash_api.cpp of versions 2 and 3 refuses q, k, v, out, dout and the gradients unless the head dim
# is contiguous (version 2's Python functions copy the first five where it is not), and loads 16
# bytes along it. It refuses cu_seqlens unless they are contiguous. It reads lse as a dense
# (heads, tokens) from its address, whatever its strides. Version 4 (cute/interface.py) copies the
# first five where the head dim is not contiguous, and assumes that they are aligned to 16 bytes; it
# seems to read the strides of lse and cu_seqlens, which is not relied on.
_ROWS = Memory(dense=(2,), alignment=16, dtypes=HALF_PRECISION)
_GRADIENT = Memory(dense=(2,), alignment=16, dtypes=HALF_PRECISION, written=True)
_LENGTHS = Memory(dense=(0,), dtypes=(torch.int32,))
_LSE = Memory(dense=(0, 1), dtypes=(torch.float32,))
_FORWARD_MEMORY = {name: _ROWS for name in "qkv"} | {
    name: _LENGTHS for name in ("cu_seqlens_q", "cu_seqlens_k")
}
_BACKWARD_MEMORY = _FORWARD_MEMORY | {name: _ROWS for name in ("dout", "out")}
_BACKWARD_2_AND_3_MEMORY = (
    _BACKWARD_MEMORY | {name: _GRADIENT for name in ("dq", "dk", "dv")} | {"softmax_lse": _LSE}
)


def _forward_2(q_THD, k_UGD, v_UGD, cu_seqlens, longest, window: Window, scale: float):
    out, lse, *_ = _FORWARD_2(
        q=q_THD, k=k_UGD, v=v_UGD, **_lengths(cu_seqlens, _at_least_two_queries(longest)),
        dropout_p=0.0, softmax_scale=scale, **_window_2_and_3("causal", window), softcap=0.0,
        alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse


def _backward_2(
    dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, cu_seqlens, longest, window: Window,
    scale: float, deterministic: bool,
):  # fmt: skip
    dq, dk, dv = gradients = [_empty_gradient(x) for x in (q_THD, k_UGD, v_UGD)]
    _BACKWARD_2(
        dout=dout_THD, q=q_THD, k=k_UGD, v=v_UGD, out=out_THD, softmax_lse=lse_HT,
        dq=dq, dk=dk, dv=dv, **_lengths(cu_seqlens, _at_least_two_queries(longest)),
        dropout_p=0.0, softmax_scale=scale, **_window_2_and_3("causal", window), softcap=0.0,
        alibi_slopes=None, deterministic=deterministic,
    )  # fmt: skip
    return gradients


def _empty_gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _interface_2():
    return importlib.import_module("flash_attn.flash_attn_interface")


_FORWARD_2 = VendorOperator(
    "flash-attn 2",
    lambda **arguments: _interface_2()._flash_attn_varlen_forward(**arguments),
    _FORWARD_MEMORY,
)
_BACKWARD_2 = VendorOperator(
    "flash-attn 2, backward",
    lambda **arguments: _interface_2()._flash_attn_varlen_backward(**arguments),
    _BACKWARD_2_AND_3_MEMORY,
)


def _at_least_two_queries(longest: tuple[int, int]) -> tuple[int, int]:
    """With a maximum of one query, version 2 assumes that every sequence has exactly one."""
    queries, keys = longest
    return max(queries, 2), keys


def _lengths(cu_seqlens: torch.Tensor, longest: tuple[int, int]) -> dict[str, torch.Tensor | int]:
    return {
        "cu_seqlens_q": cu_seqlens[0], "cu_seqlens_k": cu_seqlens[1],
        "max_seqlen_q": longest[0], "max_seqlen_k": longest[1],
    }  # fmt: skip


def _window_2_and_3(causal_name: str, window: Window) -> dict[str, bool | int]:
    """Return the arguments for a window, where versions 2 and 3 write -1 for no limit."""
    left, right = (-1 if limit is None else limit for limit in window)
    return {
        causal_name: window == _CAUSAL, "window_size_left": left, "window_size_right": right,
    }  # fmt: skip


def _forward_3(q_THD, k_UGD, v_UGD, cu_seqlens, longest, window: Window, scale: float):
    out, lse, *_ = _FORWARD_3(
        q=q_THD, k=k_UGD, v=v_UGD, **_lengths(cu_seqlens, longest), softmax_scale=scale,
        **_window_2_and_3("is_causal", window), num_splits=1,
    )  # fmt: skip
    return out, lse


def _backward_3(
    dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, cu_seqlens, longest, window: Window,
    scale: float, deterministic: bool,
):  # fmt: skip
    dq, dk, dv = gradients = [_empty_gradient(x) for x in (q_THD, k_UGD, v_UGD)]
    _BACKWARD_3(
        dout=dout_THD, q=q_THD, k=k_UGD, v=v_UGD, out=out_THD, softmax_lse=lse_HT,
        dq=dq, dk=dk, dv=dv, **_lengths(cu_seqlens, longest), softmax_scale=scale,
        **_window_2_and_3("is_causal", window), deterministic=deterministic,
    )  # fmt: skip
    return gradients


def _operators_3():
    import flash_attn_3._C  # noqa: F401  it registers them

    return torch.ops.flash_attn_3


_FORWARD_3 = VendorOperator(
    "flash-attn 3", lambda **arguments: _operators_3().fwd(**arguments), _FORWARD_MEMORY
)
_BACKWARD_3 = VendorOperator(
    "flash-attn 3, backward",
    lambda **arguments: _operators_3().bwd(**arguments),
    _BACKWARD_2_AND_3_MEMORY,
)


def _forward_4(q_THD, k_UGD, v_UGD, cu_seqlens, longest, window: Window, scale: float):
    out, lse, *_ = _FORWARD_4(
        q=q_THD, k=k_UGD, v=v_UGD, **_arguments_4(cu_seqlens, longest, window, scale),
        return_lse=True,
    )  # fmt: skip
    return out, lse


def _backward_4(
    dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, cu_seqlens, longest, window: Window,
    scale: float, deterministic: bool,
):  # fmt: skip
    dq_THD, dk_UGD, dv_UGD, *_ = _BACKWARD_4(
        q=q_THD, k=k_UGD, v=v_UGD, out=out_THD, dout=dout_THD, lse=lse_HT,
        **_arguments_4(cu_seqlens, longest, window, scale), deterministic=deterministic,
    )  # fmt: skip
    return dq_THD, dk_UGD, dv_UGD


def _arguments_4(
    cu_seqlens: torch.Tensor, longest: tuple[int, int], window: Window, scale: float
) -> dict[str, Any]:
    return _lengths(cu_seqlens, longest) | {
        "softmax_scale": scale, "causal": window == _CAUSAL,
        "window_size_left": window.left, "window_size_right": window.right,
    }  # fmt: skip


def _interface_4():
    return importlib.import_module("flash_attn.cute.interface")


_FORWARD_4 = VendorOperator(
    "flash-attn 4",
    lambda **arguments: _interface_4()._flash_attn_fwd(**arguments),
    _FORWARD_MEMORY,
)
_BACKWARD_4 = VendorOperator(
    "flash-attn 4, backward",
    lambda **arguments: _interface_4()._flash_attn_bwd(**arguments),
    _BACKWARD_MEMORY | {"lse": _LSE},
)

# Version 2 (Dao 2023, FlashAttention-2) from 2.7 on, for Ampere and later GPUs: the functions below
# its autograd ones, because the gradient of a hop needs the merged out and lse. Their parameters
# are the same in 2.7.0 and 2.8.3. Version 3 (Shah et al. 2024, FlashAttention-3), for Hopper GPUs:
# its operators, because the Python functions above them changed their parameters within 3.0.0b1 and
# the operators did not (read at commit 01d6dd1 of Dao-AILab/flash-attention). Version 4
# (flash-attn-4, a pure wheel on nvidia-cutlass-dsl), for Hopper and Blackwell GPUs: also the
# functions below its autograd ones, which are private, so one release is pinned.
_FUNCTIONS = {
    2: VarlenFunctions(_forward_2, _backward_2),
    3: VarlenFunctions(_forward_3, _backward_3),
    4: VarlenFunctions(_forward_4, _backward_4),
}
# The first version 2 whose functions return (out, lse, ...) and take window_size_left and
# window_size_right.
_OLDEST_2 = "2.7"
# As in the extra flash of pyproject.toml.
PINNED_4 = "4.0.0b36"
# The major compute capabilities that version 4 compiles for, forward and backward, with a check of
# the head dims: Hopper (9) and Blackwell's data center GPUs (10 and 11).
_CAPABILITIES_4 = (9, 10, 11)
_INSTALL = {
    2: "pip install -U flash-attn --no-build-isolation",
    4: "pip install -e '.[flash]' (flash-attn 4)",
}


@dataclass(frozen=True)
class FlashVersion:
    """The version of flash-attn that is used, and why not those that come before it."""

    number: int
    reason: str


@functools.cache
def flash_version(
    machine: Machine, head_dim: int, deterministic: bool
) -> FlashVersion | Unsupported:
    """Return the first of versions 3, 4 and 2 that supports the run, else what is missing.

    Version 3 is written for Hopper alone, so it comes first there; version 2 predates Hopper, so it
    comes last. Cached, because every hop needs it.
    """
    refusals: list[str] = []
    for number, why_not in ((3, _why_not_3), (4, _why_not_4), (2, _why_not_2)):
        refusal = why_not(machine, head_dim, deterministic)
        if not refusal:
            full = {2: machine.flash_2, 3: "3", 4: machine.flash_4}[number]
            return FlashVersion(number, "; ".join([f"flash-attn {full} is used", *refusals]))
        refusals.append(refusal)
    if too_low := machine.requires_capability((8, 0)):
        return too_low
    use_4 = machine.capability[0] in _CAPABILITIES_4 and machine.flash_4 != PINNED_4
    remedy = f"{_INSTALL[4 if use_4 else 2]}, or set --attention-kernel auto"
    return Unsupported("; ".join(refusals), remedy)


def unavailable(machine: Machine, head_dim: int, deterministic: bool) -> Unsupported | None:
    """Return why no version can run on ``machine``, None if one can."""
    version = flash_version(machine, head_dim, deterministic)
    return version if isinstance(version, Unsupported) else None


def _why_not_3(machine: Machine, head_dim: int, deterministic: bool) -> str:
    if not machine.flash_3:
        return "flash-attn 3 (the package flash_attn_3) is not installed"
    if machine.capability != (9, 0):
        return f"flash-attn 3 is built for compute capability 9.0, not {_dotted(machine)}"
    if deterministic and head_dim > 192:
        return f"flash-attn 3 is deterministic for head dims up to 192, not {head_dim}"
    return ""


def _why_not_4(machine: Machine, head_dim: int, deterministic: bool) -> str:
    if not machine.flash_4:
        return "flash-attn 4 (the package flash-attn-4) is not installed"
    if machine.flash_4 != PINNED_4:
        return f"flash-attn 4 is called as in {PINNED_4}, not {machine.flash_4}"
    major = machine.capability[0]
    if major not in _CAPABILITIES_4:
        actual = _dotted(machine)
        return f"flash-attn 4 runs on compute capabilities 9.x, 10.x and 11.x, not {actual}"
    if major != 9 and head_dim > 128:  # and 256 without windows, which its backward refuses there
        rule = f"up to 128 on compute capability {_dotted(machine)}"
        return f"flash-attn 4 is used with head dims {rule}, not {head_dim}"
    return ""


def _why_not_2(machine: Machine, head_dim: int, deterministic: bool) -> str:
    if machine.capability < (8, 0):
        return f"flash-attn 2 requires compute capability 8.0, not {_dotted(machine)}"
    if not machine.flash_2:
        return "flash-attn 2 is not installed"
    if Version(machine.flash_2) < Version(_OLDEST_2):
        return f"flash-attn {machine.flash_2} is older than {_OLDEST_2}"
    return ""


def _dotted(machine: Machine) -> str:
    return "{}.{}".format(*machine.capability)


def _library(q: torch.Tensor) -> VarlenFunctions:
    """Return the functions for such queries; ``choose`` has made sure that a version exists."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    version = flash_version(Machine.here(), q.shape[-1], deterministic)
    return _FUNCTIONS[version.number]
