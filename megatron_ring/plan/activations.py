"""Bytes that a layer keeps for backward and needs at work, for each token that a process holds. Counted from the model.

A process's residual stream has m tokens, l or l/T with sequence_parallel; all else is of l tokens and H/T heads. What
is counted is what autograd saves in torch's operators, as model/ and kernels/ call them; Korthikanti et al. 2022
(section 4.1) count alike for another model, and Liu et al. 2023 (Ring Attention, table 1) for blocks of one layer.
Recomputation changes what is kept; whatever it is, the layer that is at work has all of it again.
"""

import math
from dataclasses import dataclass

import torch

from megatron_ring.config import Config
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.parameters import share

_WIDE = torch.float32.itemsize


@dataclass(frozen=True)
class LayerBytes:
    """Of one token. kept: from forward to backward. working: besides, while backward is in this layer."""

    kept: float
    working: float


@dataclass(frozen=True)
class _Tensors:
    """Bytes of a token's tensors in a layer. ring_keys: K and V after Ulysses' repetition. inner: one of width F/T.

    norm: what a norm keeps of its input, which may be the input itself: shared, else 0. gathered: the
    norm's output, of all tensor ranks. attention_input, feed_forward_input: what the column-parallel
    layers keep of it: a rank's own shard under sequence_parallel, unless backward computes the region
    again (tensor_exchange.ShardKept). head_norms: what those of query and key heads keep, if there are
    any. product: a matrix product's of the stream's width.
    """

    residual: float
    norm: float
    shared: float
    gathered: float
    attention_input: float
    feed_forward_input: float
    head_norms: float
    product: float
    queries: float
    keys: float
    ring_keys: float
    lse: float
    inner: float


def papers_bytes_per_token(hidden_size: int) -> int:
    """6 x hidden: what a layer needs in bfloat16 by Ring Attention's table 1 (Liu et al. 2023), 6bch by its letters.

    There a device holds c tokens of b samples, h wide, and six blocks of them: Q, K, V, the output, and K and V on
    their way. The layer's input is all that lasts, 2 x hidden bytes.
    """
    return 6 * hidden_size


def layer_bytes(config: Config, grid: Grid, dtype: torch.dtype, device: str) -> LayerBytes:
    """What one layer needs for each of a process's l tokens, as ``config.memory`` says."""
    memory, tensors = config.memory, _tensors(config, grid, dtype, device)
    attention, feed_forward = (
        _saved_by_attention(config, grid, tensors),
        _saved_by_feed_forward(config, tensors),
    )
    if memory.recompute == "none":
        taken_over = attention, tensors.shared if memory.mlp_chunks > 1 else feed_forward
        kept = attention + (tensors.residual if memory.mlp_chunks > 1 else feed_forward)
    else:
        kept, *taken_over = _kept_for_recomputation(config, tensors)
    # Where backward needs most: between the feed-forward's matrices, or in attention, the feed-forward being done.
    gradients_of_inner = (2 if config.model.activation == "swiglu" else 1) * tensors.inner
    gathered_again = tensors.gathered if tensors.feed_forward_input < tensors.gathered else 0
    working = tensors.residual + max(
        (feed_forward - taken_over[1] + gradients_of_inner + gathered_again) / memory.mlp_chunks,
        _backward_through_attention(config, grid, tensors, dtype)
        + tensors.residual
        - taken_over[1],
    )
    working += attention - taken_over[0]
    return LayerBytes(kept, working)


def inputs_gathered_again(config: Config) -> int:
    """How many gathered inputs of a layer backward gathers once more (model/execution.py)."""
    return _keeps_shard_of_attention_input(config) + _keeps_shard_of_feed_forward_input(config)


def _keeps_shard_of_attention_input(config: Config) -> bool:
    return config.parallel.sequence_parallel and config.memory.recompute == "none"


def _keeps_shard_of_feed_forward_input(config: Config) -> bool:
    return _keeps_shard_of_attention_input(config) and config.memory.mlp_chunks == 1


def _tensors(config: Config, grid: Grid, dtype: torch.dtype, device: str) -> _Tensors:
    model, ranks = config.model, grid.tensor
    size, hidden = dtype.itemsize, model.hidden_size
    split = ranks if config.parallel.sequence_parallel else 1
    heads, groups = share(model.num_attention_heads, ranks), share(model.key_value_heads, ranks)
    gathered = size * hidden
    # RMSNorm on a CPU is several operators, which keep x and x / rms in float32; LayerNorm and CUDA's keep x.
    wide = model.normalization == "RMSNorm" and device == "cpu"

    def norm(width: int) -> int:
        return 2 * _WIDE * width + _WIDE if wide else size * width + 2 * _WIDE

    return _Tensors(
        residual=size * hidden / split,
        norm=norm(hidden) / split,
        shared=0 if wide and size < _WIDE else size * hidden / split,
        gathered=gathered,
        attention_input=gathered / (split if _keeps_shard_of_attention_input(config) else 1),
        feed_forward_input=gathered / (split if _keeps_shard_of_feed_forward_input(config) else 1),
        head_norms=model.qk_layernorm * (heads + groups) * norm(model.head_dim),
        product=size * hidden,
        queries=size * heads * model.head_dim,
        keys=2 * size * groups * model.head_dim,
        ring_keys=2 * size * math.lcm(groups, grid.ulysses) * model.head_dim,
        lse=_WIDE * heads,
        inner=size * share(model.feed_forward_size, ranks),
    )


def _saved_by_attention(config: Config, grid: Grid, x: _Tensors) -> float:
    """Norm, its output, norms of heads, Q, K and V as the ring takes them, the ring's output and log-sum-exp."""
    saved = x.norm + x.attention_input + x.head_norms + x.queries + x.ring_keys + x.queries + x.lse
    saved += x.queries if grid.ulysses > 1 else 0  # the output with its heads together again
    return saved + (x.queries + x.lse if config.model.softmax_type != "vanilla" else 0)


def _saved_by_feed_forward(config: Config, x: _Tensors) -> float:
    """Norm, its output, and of width F: gate, silu(gate), up and their product; or the product and its gelu."""
    return (
        x.norm + x.feed_forward_input + (4 if config.model.activation == "swiglu" else 2) * x.inner
    )


def _kept_for_recomputation(config: Config, x: _Tensors) -> tuple[float, float, float]:
    """What is kept, and how much of it attention and feed-forward take over when they are computed again.

    The block's input; the ring's results unless it runs again; and with ``selective`` every product.
    """
    memory = config.memory
    attention = 0.0 if memory.recompute_attention else x.queries + x.lse
    feed_forward = 0.0
    if memory.recompute == "selective":
        attention += x.queries + x.keys + x.product
        if memory.mlp_chunks == 1:
            feed_forward = (2 if config.model.activation == "swiglu" else 1) * x.inner + x.product
    return x.residual + attention + feed_forward, attention + x.shared, feed_forward


def _backward_through_attention(
    config: Config, grid: Grid, x: _Tensors, dtype: torch.dtype
) -> float:
    by_blocks = config.parallel.context_parallel_reduction == "invariant"
    return (_backward_by_blocks if by_blocks else _backward_through_ring)(grid, x, dtype)


def _backward_by_blocks(grid: Grid, x: _Tensors, dtype: torch.dtype) -> float:
    """The same of context_parallel/invariant: the keys travel, and all is there in blocks, put together at the end."""
    queries_sum, keys_sum = (_WIDE / dtype.itemsize * y for y in (x.queries, x.ring_keys))
    blocks = 3 * x.queries + x.ring_keys + queries_sum + keys_sum
    travelling = 2 * (x.ring_keys + keys_sum) if grid.ring > 1 else 0
    return x.queries + blocks + max(travelling, queries_sum + keys_sum)


def _backward_through_ring(grid: Grid, x: _Tensors, dtype: torch.dtype) -> float:
    """The gradient of the output, float32 sums of those of Q, K and V, and what is on its way (context_parallel/ring).

    On its way are one message that leaves and one that comes, and so for the sums that follow: of the keys, or of the
    queries with their outputs' gradients, lse and delta, whichever are fewer bytes. A rank's own sums wait at home for
    these, beside those of the hop at hand.
    """
    queries_sum, keys_sum = (_WIDE / dtype.itemsize * y for y in (x.queries, x.ring_keys))
    cast = 0 if dtype == torch.float32 else x.queries + x.ring_keys
    of_keys, of_queries = (x.ring_keys, keys_sum), (2 * x.queries + 2 * x.lse, queries_sum)
    message, sums = min(of_keys, of_queries, key=sum)
    travelling = 2 * (message + sums) + (sums if grid.ring > 2 else 0) if grid.ring > 1 else 0
    return x.queries + queries_sum + keys_sum + max(cast, travelling)
