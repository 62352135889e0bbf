"""The exchange of heads for tokens between real ranks: what arrives, in how many messages."""

from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megatron_ring.context_parallel import ulysses
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid
from tests import oracle
from tests.distributed import run_ranks

GROUP_SIZES = (2, 3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# batch, tokens per rank, query heads per rank, key-value heads, head dim
SHAPES = [
    (2, 5, 3, 3, 4),
    (3, 2, 2, 1, 5),
    (1, 4, 2, 2, 8),
    (2, 3, 4, 4, 7),
    (1, 1, 6, 6, 1),
    (2, 1, 1, 1, 1),
]
ITEMSIZE = {torch.bfloat16: 2, torch.float32: 4}


def ulysses_group(rank: int, size: int) -> ulysses.UlyssesGroup:
    return ulysses.UlyssesGroup.of(ProcessGroups.build(Grid(ulysses=size), rank).ulysses)


def whole(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, kv and log-sum-exp of all ranks' tokens."""
    batch, tokens, heads, groups, head_dim = shape
    q, k, v, _ = oracle.random_inputs(batch, size * tokens, size * heads, groups, dtype, head_dim)
    return [q, torch.stack([k, v]), oracle.random_dlse(q)]


def of_rank(rank: int, size: int, q, kv, lse) -> list[torch.Tensor]:
    """Return the part of a rank's tokens."""
    return [q.chunk(size, 1)[rank], kv.chunk(size, 2)[rank], lse.chunk(size, 2)[rank]]


def exchange_and_return(rank: int, size: int) -> dict:
    """Return, by shape and type, q and kv after gather_tokens, and q and lse after gather_heads."""
    group = ulysses_group(rank, size)
    results = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            *inputs, _ = of_rank(rank, size, *whole(size, shape, dtype))
            q, kv = ulysses.gather_tokens(*inputs, group)
            lse = whole(size, shape, dtype)[2].chunk(size, 1)[rank]
            results[shape, dtype] = q, kv, *ulysses.gather_heads(q, lse, group)
    return results


@pytest.fixture(scope="module")
def exchanged() -> dict[int, list[dict]]:
    """The results of every rank, by the size of the group."""
    return {size: run_ranks(size, exchange_and_return) for size in GROUP_SIZES}


each_exchange = pytest.mark.parametrize(
    ("size", "shape", "dtype"),
    [(size, shape, dtype) for size in GROUP_SIZES for shape in SHAPES for dtype in DTYPES],
    ids=str,
)


@each_exchange
def test_a_rank_gets_its_query_heads_and_the_keys_they_read_of_all_tokens(
    size, shape, dtype, exchanged
):
    q, kv, _ = whole(size, shape, dtype)
    heads = q.shape[2]
    groups = kv.shape[3]
    for rank, results in enumerate(exchanged[size]):
        local_q, local_kv, *_ = results[shape, dtype]
        local_heads = local_q.shape[2]
        local_groups = local_kv.shape[3]
        assert local_q.is_contiguous()
        assert local_kv.is_contiguous()
        assert torch.equal(local_q, q.chunk(size, 2)[rank])
        for head in range(local_heads):
            expected = kv[:, :, :, (rank * local_heads + head) * groups // heads]
            assert torch.equal(local_kv[:, :, :, head * local_groups // local_heads], expected)


@each_exchange
def test_heads_return_to_their_tokens_bit_for_bit(size, shape, dtype, exchanged):
    q, kv, lse = whole(size, shape, dtype)
    for rank, results in enumerate(exchanged[size]):
        expected_q, _, expected_lse = of_rank(rank, size, q, kv, lse)
        for returned, expected in zip(results[shape, dtype][2:], (expected_q, expected_lse)):
            assert returned.dtype == expected.dtype
            assert torch.equal(returned, expected)


@given(st.data())
def test_repeated_heads_divide_evenly_and_are_read_as_before(data):
    groups = data.draw(st.integers(1, 12))
    ranks = data.draw(st.integers(1, 12))
    kv_2BlGD = torch.arange(groups).view(1, 1, 1, groups, 1).expand(2, 1, 1, groups, 1)
    heads = ulysses.repeat_kv_heads(kv_2BlGD, ranks)[0].flatten().tolist()
    assert len(heads) % ranks == 0
    assert heads == [j * groups // len(heads) for j in range(len(heads))]
    assert all(groups * times % ranks for times in range(1, len(heads) // groups))


# ---- messages ----

SHARD, HEADS, GROUPS, HEAD_DIM, BATCH = 12, 4, 2, 8, 2
GRIDS = {
    2: [Grid(ring=2), Grid(ulysses=2)],
    4: [Grid(ring=4), Grid(ring=2, ulysses=2), Grid(ulysses=4)],
}


def keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op is torch.ops.megatron_ring.ring_attention.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


KEEP_ATTENTION = partial(create_selective_checkpoint_contexts, keep_attention)


class Messages(NamedTuple):
    """The bytes of each Ulysses message, and the number of ring transfers."""

    ulysses: list[int]
    hops: int


class Layer(NamedTuple):
    """The messages of one layer."""

    forward: Messages
    backward: Messages


def count_messages(rank: int, world_size: int) -> dict[tuple, Layer]:
    """Return the messages by grid, type, and which results have a gradient or are recomputed."""
    results = {}
    for grid in GRIDS[world_size]:
        groups = ProcessGroups.build(grid, rank)
        for dtype in ITEMSIZE:
            for mode in ("out", "lse", "both", "recomputed"):
                results[grid, dtype, mode] = messages_of(groups, grid, dtype, mode)
    return results


def messages_of(groups: ProcessGroups, grid: Grid, dtype: torch.dtype, mode: str) -> Layer:
    layout = Layout("striped", SHARD * grid.ring, grid.ring)
    attention = ContextParallelAttention(layout, "sdpa", groups)
    q, k, v, _ = oracle.random_inputs(BATCH, SHARD // grid.ulysses, HEADS, GROUPS, dtype, HEAD_DIM)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    call = attention
    if mode == "recomputed":
        call = partial(checkpoint, attention, use_reentrant=False, context_fn=KEEP_ATTENTION)
    with (
        patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as all_to_all,
        patch.object(
            RingExchange, "start_with", autospec=True, side_effect=RingExchange.start_with
        ) as start,
    ):

        def messages_since_last_call() -> Messages:
            sizes = [call.args[0].nbytes for call in all_to_all.call_args_list]
            messages = Messages(sizes, start.call_count)
            all_to_all.reset_mock()
            start.reset_mock()
            return messages

        out, lse = call(*inputs)
        forward = messages_since_last_call()
        with_gradient = {"out": [out], "lse": [lse]}.get(mode, [out, lse])
        torch.autograd.grad([x.sum() for x in with_gradient], inputs)
        return Layer(forward, messages_since_last_call())


@pytest.fixture(scope="module")
def messages() -> dict[int, list[dict[tuple, Layer]]]:
    """The messages of every rank, by world size."""
    return {world_size: run_ranks(world_size, count_messages) for world_size in GRIDS}


each_grid = pytest.mark.parametrize(
    "grid", [grid for grids in GRIDS.values() for grid in grids], ids=str
)
each_dtype = pytest.mark.parametrize("dtype", ITEMSIZE, ids=str)


@each_dtype
@each_grid
@pytest.mark.parametrize("mode", ["out", "lse", "both"])
def test_ulysses_sends_one_message_each_way_and_adds_no_hop(grid, dtype, mode, messages):
    """One of q, k and v, and one of the results that have a gradient; none in a group of one."""
    rows = BATCH * SHARD // grid.ulysses
    itemsize = ITEMSIZE[dtype]
    qkv = rows * (HEADS + 2 * max(GROUPS, grid.ulysses)) * HEAD_DIM * itemsize
    out = rows * HEADS * HEAD_DIM * itemsize
    lse = rows * HEADS * 4
    with_gradient = {"out": out, "lse": lse, "both": out + lse}[mode]
    forward, backward = [], []
    if grid.ulysses > 1:
        forward = [qkv, out + lse]
        backward = [with_gradient, qkv]
    for of_rank in messages[grid.world_size]:
        assert of_rank[grid, dtype, mode] == Layer(
            Messages(forward, grid.ring - 1), Messages(backward, 2 * (grid.ring - 1))
        )


@each_grid
def test_recomputing_a_layer_repeats_ulysses_exchanges_but_not_the_ring(grid, messages):
    for of_rank in messages[grid.world_size]:
        recomputed = of_rank[grid, torch.float32, "recomputed"]
        without = of_rank[grid, torch.float32, "both"]
        assert recomputed.forward == without.forward
        assert recomputed.backward.hops == without.backward.hops


# ---- the operator ----


def check_operator(rank: int, size: int) -> dict[str, str]:
    """Check schema, autograd and fake tensors, for tensors of two types."""
    group = ulysses_group(rank, size)
    q, _, lse = whole(size, SHAPES[0], torch.bfloat16)
    tensors = [q.requires_grad_(), lse.mT.unsqueeze(-1).requires_grad_()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    return torch.library.opcheck(
        ulysses.all_to_all_heads, (tensors, -3, -2, group.size, group.group), test_utils=checks
    )


def test_torch_accepts_the_operator():
    assert [set(of_rank.values()) for of_rank in run_ranks(2, check_operator)] == [{"SUCCESS"}] * 2


def compiled_and_eager(rank: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of gradients of a compiled layer and of one in eager mode."""
    groups = ProcessGroups.build(Grid(ulysses=size), rank)
    attention = ContextParallelAttention(Layout("none", 5 * size, 1), "sdpa", groups)
    q, k, v, _ = oracle.random_inputs(BATCH, 5, HEADS, 1, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        out, lse = attention(*inputs)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    return list(zip(*(torch.autograd.grad(each(*inputs), inputs) for each in (compiled, loss))))


def test_a_layer_compiles_without_graph_breaks():
    for gradients in run_ranks(2, compiled_and_eager):
        assert all(torch.equal(compiled, eager) for compiled, eager in gradients)


def with_odd_heads(rank: int, size: int) -> str:
    group = ulysses_group(rank, size)
    q, k, v, _ = oracle.random_inputs(1, 4, 3, 3)
    with pytest.raises(AssertionError) as raised:
        ulysses.gather_tokens(q, torch.stack([k, v]), group)
    return str(raised.value)


def test_query_heads_that_ranks_cannot_split_fail_an_assertion():
    assert run_ranks(2, with_odd_heads) == ["3 query heads do not divide by 2 ranks"] * 2


def test_a_single_rank_copies_nothing():
    single = ulysses.UlyssesGroup.of(None)
    q, kv, lse = whole(1, SHAPES[0], torch.float32)
    gathered_q, gathered_kv = ulysses.gather_tokens(q, kv, single)
    assert gathered_q is q
    assert gathered_kv is kv
    gathered_out, gathered_lse = ulysses.gather_heads(q, lse, single)
    assert gathered_out is q
    assert gathered_lse is lse
