"""One hop through Dao's flash-attn, version 3 on Hopper GPUs where it is installed, else version 2.

Its packed functions take what needs no mask, many tiles in a call (packs.py): each document of a striped pack is a
triangle, whatever its length. What is left, the edges of windows and of wide stripes, goes to torch's memory-efficient
kernel. The layout is ours, (tokens, heads, head size) with fewer key-value heads, so nothing is transposed.

Under ``torch.use_deterministic_algorithms`` gradients are added up in the same order every time. Never run on a GPU.
"""

from types import ModuleType

import torch

from megatron_ring.kernels.attention import flash2, flash3, torch_efficient
from megatron_ring.kernels.attention.flash_version import flash_version
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.packs import Pack
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import Output, RunningSoftmax, output_of
from megatron_ring.kernels.attention.tiled import Tiled
from megatron_ring.kernels.attention.tiles import TileKind, Tiling

_TILING = Tiling(rows=1024, split_triangles=False, part_documents=True)
_LEFT = Tiled(_TILING, lambda tile: torch_efficient if tile.kind is TileKind.MASKED else None)


def forward(
    q_BLHD: torch.Tensor,
    k_BLGD: torch.Tensor,
    v_BLGD: torch.Tensor,
    runs: KeyRanges,
    scale: float,
    state: RunningSoftmax,
) -> None:
    """Let the queries see their runs of this block of keys; ``state`` is updated in place."""
    batch, library = len(q_BLHD), _library(q_BLHD)
    for pack in runs.packs(_TILING):
        q, k, v = q_BLHD[:, pack.queries], k_BLGD[:, pack.keys], v_BLGD[:, pack.keys]
        out, lse = library.forward(*map(_end_to_end, (q, k, v)), *_sequences(runs, pack, q), scale)
        lse_BHL = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        # Version 2 answers +inf for a row that sees nothing, and would so win every merge.
        state.merge(
            pack.queries,
            out.unflatten(0, (batch, -1)),
            lse_BHL.masked_fill(lse_BHL == torch.inf, -torch.inf),
        )
    _LEFT.forward(q_BLHD, k_BLGD, v_BLGD, runs, scale, state)


def backward(
    dout_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLGD: torch.Tensor,
    v_BLGD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    runs: KeyRanges,
    scale: float,
    dq_BLHD: torch.Tensor,
    dk_BLGD: torch.Tensor,
    dv_BLGD: torch.Tensor,
) -> None:
    """Add this block's share to ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` are the final, merged ones."""
    inputs, sums = (dout_BLHD, q_BLHD, k_BLGD, v_BLGD, output_of(out)), (dq_BLHD, dk_BLGD, dv_BLGD)
    library, deterministic = _library(q_BLHD), torch.are_deterministic_algorithms_enabled()
    for pack in runs.packs(_TILING):
        rows, keys = pack.queries, pack.keys
        tensors = [
            _end_to_end(x[:, part]) for x, part in zip(inputs, (rows, rows, keys, keys, rows))
        ]
        lse_HT = lse_BHL[:, :, rows].transpose(0, 1).flatten(1).contiguous()
        gradients = library.backward(
            *tensors, lse_HT, *_sequences(runs, pack, q_BLHD), scale, deterministic
        )
        for whole, part, gradient in zip(sums, (rows, keys, keys), gradients):
            whole[:, part] += gradient.unflatten(0, (len(q_BLHD), -1))
    _LEFT.backward(*inputs, lse_BHL, runs, scale, *sums)


def _library(q: torch.Tensor) -> ModuleType:
    """The version for such queries; ``choose`` has made sure that there is one."""
    version = flash_version(
        Machine.here(), q.shape[-1], torch.are_deterministic_algorithms_enabled()
    )
    return {2: flash2, 3: flash3}[version.number]


def _end_to_end(x_BLHD: torch.Tensor) -> torch.Tensor:
    """Samples one behind the other; a copy only of parts of several samples."""
    return x_BLHD.flatten(0, 1)


def _sequences(
    runs: KeyRanges, pack: Pack, q: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int], bool]:
    """The cumulative lengths (2, sequences + 1), the longest sequences of queries and keys, and whether triangles."""
    return runs.pack_bounds(pack, len(q), q.device), pack.longest, pack.kind is TileKind.CAUSAL
