"""Bytes per token that a layer keeps for backward and needs during its own backward.

A process has l tokens, of which the residual stream holds m: all, or l/T with sequence_parallel.
Counted are the tensors that autograd saves in the operators that model/ and kernels/ call.
Korthikanti et al. 2022 (section 4.1) count alike for another model, and Liu et al. 2023 (Ring
Attention, table 1) for the blocks of one layer. Recomputation changes what is kept; in any mode,
the layer that backward is in has all of its tensors again.
"""

import math
from dataclasses import dataclass

import torch

from megatron_ring.config import Config
from megatron_ring.context_parallel.hop_cost import direct_buffers, exchanges_in_flight
from megatron_ring.model.shapes import layer_shapes
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.parameters import share

_FP32 = torch.float32.itemsize


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token: kept from forward to backward; working on top, in this layer's backward."""

    kept: float
    working: float


@dataclass(frozen=True)
class _TensorBytes:
    """Bytes per token of a layer's tensors.

    norm: what a norm keeps of its input; shared: the part of it that is the input itself, else 0.
    gathered: the norm's output, gathered from all tensor ranks. attention_input, mlp_input: what
    the column-parallel layers keep of it, which is the rank's own shard under sequence_parallel
    unless backward recomputes the region (tensor_exchange.SharedInput). head_norms: what norms of
    query and key heads keep, if there are any. matmul: the output of a matmul of the width of the
    stream. ring_keys: K and V after Ulysses repeats heads. inner: one tensor of width F/T.
    """

    residual: float
    norm: float
    shared: float
    gathered: float
    attention_input: float
    mlp_input: float
    head_norms: float
    matmul: float
    queries: float
    keys: float
    ring_keys: float
    lse: float
    inner: float


def ring_attention_paper_bytes(hidden_size: int) -> int:
    """Return the bytes per token of a bfloat16 layer by Ring Attention's table 1: 6 x hidden.

    The paper (Liu et al. 2023) writes 6bch for c tokens of b samples, h wide, on a device: six
    blocks, which are Q, K, V, the output, and K and V in transfer. Only the layer's input is kept,
    2 x hidden bytes.
    """
    return 6 * hidden_size


def layer_bytes(config: Config, grid: Grid, dtype: torch.dtype, device: str) -> LayerBytes:
    """Return the bytes of one layer for each of a process's l tokens, under ``config.memory``."""
    memory = config.memory
    tensors = _tensor_bytes(config, grid, dtype, device)
    attention = _saved_by_attention(config, grid, tensors)
    mlp = _saved_by_mlp(config, tensors)
    # Parts of what is kept that are reused, not duplicated, when the layer is recomputed.
    if memory.recompute != "none":
        kept, attention_reused, mlp_reused = _kept_for_recomputation(config, tensors)
    elif memory.mlp_chunks > 1:
        kept = attention + tensors.residual
        attention_reused = attention
        mlp_reused = tensors.shared
    else:
        kept = attention + mlp
        attention_reused = attention
        mlp_reused = mlp
    # Backward needs the most between the matmuls of the MLP, or in attention after the MLP is done.
    inner_gradients = _input_projections(config) * tensors.inner
    gathered_again = tensors.gathered if tensors.mlp_input < tensors.gathered else 0
    in_mlp = (mlp - mlp_reused + inner_gradients + gathered_again) / memory.mlp_chunks
    in_attention = (
        _backward_through_attention(config, grid, tensors, dtype) + tensors.residual - mlp_reused
    )
    working = tensors.residual + max(in_mlp, in_attention) + attention - attention_reused
    return LayerBytes(kept, working)


def inputs_gathered_again(config: Config) -> int:
    """Return how many inputs of a layer backward gathers again (recompute.shared_input)."""
    return _keeps_shard_of_attention_input(config) + _keeps_shard_of_mlp_input(config)


def _keeps_shard_of_attention_input(config: Config) -> bool:
    return config.parallel.sequence_parallel and config.memory.recompute == "none"


def _keeps_shard_of_mlp_input(config: Config) -> bool:
    return _keeps_shard_of_attention_input(config) and config.memory.mlp_chunks == 1


def _input_projections(config: Config) -> int:
    """Return how many matmuls lead from the stream to width F: gate and up, or up."""
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    shapes = layer_shapes(config.model)
    return sum(name in shapes for name in names)


def _tensor_bytes(config: Config, grid: Grid, dtype: torch.dtype, device: str) -> _TensorBytes:
    model = config.model
    ranks = grid.tensor
    shapes = layer_shapes(model, ranks)
    heads = share(model.num_attention_heads, ranks)
    groups = share(model.key_value_heads, ranks)
    size = dtype.itemsize
    gathered = size * model.hidden_size
    split = ranks if config.parallel.sequence_parallel else 1
    # RMSNorm on a CPU is several operators, which keep x and x / rms in float32; LayerNorm, and
    # any norm on CUDA, keeps x.
    keeps_fp32 = model.normalization == "RMSNorm" and device == "cpu"

    def norm(width: int) -> int:
        return 2 * _FP32 * width + _FP32 if keeps_fp32 else size * width + 2 * _FP32

    return _TensorBytes(
        residual=gathered / split,
        norm=norm(model.hidden_size) / split,
        shared=0 if keeps_fp32 and size < _FP32 else gathered / split,
        gathered=gathered,
        attention_input=gathered / (split if _keeps_shard_of_attention_input(config) else 1),
        mlp_input=gathered / (split if _keeps_shard_of_mlp_input(config) else 1),
        head_norms=model.qk_layernorm * (heads + groups) * norm(model.head_dim),
        matmul=gathered,
        queries=size * shapes["attention.q_proj.weight"][0],
        keys=2 * size * shapes["attention.k_proj.weight"][0],
        ring_keys=2 * size * math.lcm(groups, grid.ulysses) * model.head_dim,
        lse=_FP32 * heads,
        inner=size * shapes["mlp.up_proj.weight"][0],
    )


def _saved_by_attention(config: Config, grid: Grid, x: _TensorBytes) -> float:
    """Return the bytes that attention saves.

    These are the norm, its output, norms of heads, Q, K and V as the ring gets them, and the ring's
    output and log-sum-exp.
    """
    ring_output = x.queries + x.lse
    saved = x.norm + x.attention_input + x.head_norms + x.queries + x.ring_keys + ring_output
    if grid.ulysses > 1:
        saved += x.queries  # the output after the all-to-all that restores all heads
    if config.model.softmax_type != "vanilla":
        saved += ring_output
    return saved


def _saved_by_mlp(config: Config, x: _TensorBytes) -> float:
    """Return the bytes that the MLP saves.

    These are the norm, its output, and of width F gate, silu(gate), up and their product, or up and
    its gelu.
    """
    inner_tensors = 4 if config.model.activation == "swiglu" else 2
    return x.norm + x.mlp_input + inner_tensors * x.inner


def _kept_for_recomputation(config: Config, x: _TensorBytes) -> tuple[float, float, float]:
    """Return the bytes kept, and how many of them attention and MLP reuse when they are recomputed.

    Kept are the block's input, the ring's results unless it runs again, and with ``selective``
    every matmul.
    """
    memory = config.memory
    attention = 0.0 if memory.recompute_attention else x.queries + x.lse
    mlp = 0.0
    if memory.recompute == "selective":
        attention += x.queries + x.keys + x.matmul
        if memory.mlp_chunks == 1:
            mlp = _input_projections(config) * x.inner + x.matmul
    return x.residual + attention + mlp, attention + x.shared, mlp


def _backward_through_attention(
    config: Config, grid: Grid, x: _TensorBytes, dtype: torch.dtype
) -> float:
    if config.parallel.context_parallel_reduction == "invariant":
        return _backward_in_blocks(grid, x, dtype)
    sends_rows = config.data.reset_attention_mask
    return _backward_through_ring(grid, x, dtype, sends_rows)


def _backward_in_blocks(grid: Grid, x: _TensorBytes, dtype: torch.dtype) -> float:
    """Return the bytes of context_parallel/invariant in backward.

    Keys travel; all blocks exist and are concatenated at the end.
    """
    fp32_factor = _FP32 / dtype.itemsize
    queries_sum = fp32_factor * x.queries
    keys_sum = fp32_factor * x.ring_keys
    blocks = 3 * x.queries + x.ring_keys + queries_sum + keys_sum
    in_transfer = 2 * (x.ring_keys + keys_sum) if grid.ring > 1 else 0
    return x.queries + blocks + max(in_transfer, queries_sum + keys_sum)


def _backward_through_ring(
    grid: Grid, x: _TensorBytes, dtype: torch.dtype, sends_rows: bool
) -> float:
    """Return the bytes of context_parallel/ring in backward.

    These are the output's gradient, the float32 sums for Q, K and V, and what is in transfer.

    In transfer are one message that is sent and one that is received, and as many for the sums that
    follow: of the keys, or of the queries with their outputs' gradients, lse and delta, whichever
    are fewer bytes. With more than two ranks a rank's own sums wait for those besides the sums of
    current hop. ``sends_rows``: documents are kept apart, so the rows that others read are copied
    to a message, at most all of them, and several exchanges are in flight in a long ring.
    """
    fp32_factor = _FP32 / dtype.itemsize
    queries_sum = fp32_factor * x.queries
    keys_sum = fp32_factor * x.ring_keys
    cast = 0 if dtype == torch.float32 else x.queries + x.ring_keys
    of_keys = (x.ring_keys, keys_sum)
    of_queries = (2 * x.queries + 2 * x.lse, queries_sum)
    message, sums = min(of_keys, of_queries, key=sum)
    in_transfer = 0.0
    if sends_rows:
        buffers = direct_buffers(grid.ring, exchanges_in_flight(grid.ring))
        in_transfer = buffers * (message + sums)
    elif grid.ring > 1:
        in_transfer = 2 * (message + sums) + (grid.ring > 2) * sums
    return x.queries + queries_sum + keys_sum + max(cast, in_transfer)
