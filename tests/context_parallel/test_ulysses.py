"""The trade of heads for tokens between real ranks: what arrives where, in how many messages, and what goes back."""

from functools import partial
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

MEMBERS = (2, 3)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# batch, one member's tokens, query heads for each member, key-value heads, head size
SIZES = [
    (2, 5, 3, 3, 4),
    (3, 2, 2, 1, 5),
    (1, 4, 2, 2, 8),
    (2, 3, 4, 4, 7),
    (1, 1, 6, 6, 1),
    (2, 1, 1, 1, 1),
]
BYTES_OF_A_MESSAGE = {torch.bfloat16: 2, torch.float32: 4}


def members_of(rank: int, members: int) -> ulysses.UlyssesGroup:
    return ulysses.UlyssesGroup.of(ProcessGroups.build(Grid(ulysses=members), rank).ulysses)


def whole(members: int, size: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, kv and log-sum-exp of all members' tokens."""
    batch, tokens, heads, groups, head_size = size
    q, k, v, _ = oracle.random_inputs(
        batch, members * tokens, members * heads, groups, dtype, head_size
    )
    return [q, torch.stack([k, v]), oracle.random_dlse(q)]


def own(rank: int, members: int, q, kv, lse) -> list[torch.Tensor]:
    """The member's tokens of them."""
    return [q.chunk(members, 1)[rank], kv.chunk(members, 2)[rank], lse.chunk(members, 2)[rank]]


def trades(rank: int, members: int) -> dict:
    """For every size and type: what a member is given of all tokens, and what becomes of it on the way back."""
    here, found = members_of(rank, members), {}
    for size in SIZES:
        for dtype in TYPES:
            *given, _ = own(rank, members, *whole(members, size, dtype))
            q, kv = ulysses.gather_tokens(*given, here)
            lse = whole(members, size, dtype)[2].chunk(members, 1)[rank]
            found[size, dtype] = q, kv, *ulysses.gather_heads(q, lse, here)
    return found


@pytest.fixture(scope="module")
def traded() -> dict[int, list[dict]]:
    """What every member was given, by their number."""
    return {members: run_ranks(members, trades) for members in MEMBERS}


each_trade = pytest.mark.parametrize(
    ("members", "size", "dtype"),
    [(members, size, dtype) for members in MEMBERS for size in SIZES for dtype in TYPES],
    ids=str,
)


@each_trade
def test_a_member_is_given_its_query_heads_and_the_keys_they_read_of_all_tokens(
    members, size, dtype, traded
):
    q, kv, _ = whole(members, size, dtype)
    heads, groups = q.shape[2], kv.shape[3]
    for rank, found in enumerate(traded[members]):
        q_here, kv_here, *_ = found[size, dtype]
        heads_here, groups_here = q_here.shape[2], kv_here.shape[3]
        assert q_here.is_contiguous()
        assert kv_here.is_contiguous()
        assert torch.equal(q_here, q.chunk(members, 2)[rank])
        for head in range(heads_here):
            read = kv[:, :, :, (rank * heads_here + head) * groups // heads]
            assert torch.equal(kv_here[:, :, :, head * groups_here // heads_here], read)


@each_trade
def test_heads_come_back_to_their_tokens_bit_for_bit(members, size, dtype, traded):
    q, kv, lse = whole(members, size, dtype)
    for rank, found in enumerate(traded[members]):
        expected_q, _, expected_lse = own(rank, members, q, kv, lse)
        for arrived, expected in zip(found[size, dtype][2:], (expected_q, expected_lse)):
            assert arrived.dtype == expected.dtype
            assert torch.equal(arrived, expected)


@given(st.data())
def test_repeated_heads_are_shared_out_evenly_and_read_as_before(data):
    groups, members = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    kv_2BlGD = torch.arange(groups).view(1, 1, 1, groups, 1).expand(2, 1, 1, groups, 1)
    heads = ulysses.repeated(kv_2BlGD, members)[0].flatten().tolist()
    assert len(heads) % members == 0
    assert heads == [j * groups // len(heads) for j in range(len(heads))]
    assert all(groups * times % members for times in range(1, len(heads) // groups))


# ---- messages ----

SHARD, HEADS, GROUPS, HEAD_SIZE, BATCH = 12, 4, 2, 8, 2
TRAFFIC = {
    2: [Grid(ring=2), Grid(ulysses=2)],
    4: [Grid(ring=4), Grid(ring=2, ulysses=2), Grid(ulysses=4)],
}


def keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op is torch.ops.megatron_ring.ring_attention.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


KEPT = partial(create_selective_checkpoint_contexts, keep_attention)


def count_messages(rank: int, world_size: int) -> dict:
    """The bytes of each trade and the number of ring transfers, by grid, type and what is read."""
    found = {}
    for grid in TRAFFIC[world_size]:
        groups = ProcessGroups.build(grid, rank)
        for dtype in BYTES_OF_A_MESSAGE:
            for mode in ("out", "lse", "both", "recomputed"):
                found[grid, dtype, mode] = messages_of(groups, grid, dtype, mode)
    return found


def messages_of(
    groups: ProcessGroups, grid: Grid, dtype: torch.dtype, mode: str
) -> list[tuple[list[int], int]]:
    """Of one layer, forward and then backward."""
    attention = ContextParallelAttention(
        Layout("striped", SHARD * grid.ring, grid.ring), "sdpa", groups
    )
    inputs = oracle.random_inputs(BATCH, SHARD // grid.ulysses, HEADS, GROUPS, dtype, HEAD_SIZE)[:3]
    inputs, counted = [x.requires_grad_() for x in inputs], []
    call = (
        partial(checkpoint, attention, use_reentrant=False, context_fn=KEPT)
        if mode == "recomputed"
        else attention
    )
    with (
        patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as trades,
        patch.object(RingExchange, "start", autospec=True, side_effect=RingExchange.start) as hops,
    ):

        def count() -> None:
            counted.append(
                ([call.args[0].nbytes for call in trades.call_args_list], hops.call_count)
            )
            trades.reset_mock()
            hops.reset_mock()

        out, lse = call(*inputs)
        count()
        read = {"out": [out], "lse": [lse]}.get(mode, [out, lse])
        torch.autograd.grad([x.sum() for x in read], inputs)
        count()
    return counted


@pytest.fixture(scope="module")
def counted() -> dict[int, list[dict]]:
    return {world_size: run_ranks(world_size, count_messages) for world_size in TRAFFIC}


each_grid = pytest.mark.parametrize(
    "grid", [grid for grids in TRAFFIC.values() for grid in grids], ids=str
)
each_type = pytest.mark.parametrize("dtype", BYTES_OF_A_MESSAGE, ids=str)


@each_type
@each_grid
@pytest.mark.parametrize("mode", ["out", "lse", "both"])
def test_one_message_each_way_and_no_hop_more(grid, dtype, mode, counted):
    """Of q, k and v on the way there, of what was read on the way back; none where nobody shares the ring rank."""
    rows, itemsize = BATCH * SHARD // grid.ulysses, BYTES_OF_A_MESSAGE[dtype]
    there = rows * (HEADS + 2 * max(GROUPS, grid.ulysses)) * HEAD_SIZE * itemsize
    out, lse = rows * HEADS * HEAD_SIZE * itemsize, rows * HEADS * 4
    back = {"out": out, "lse": lse, "both": out + lse}[mode]
    trades = ([there, out + lse], [back, there]) if grid.ulysses > 1 else ([], [])
    for found in counted[grid.world_size]:
        (forward, forward_hops), (backward, backward_hops) = found[grid, dtype, mode]
        assert (forward, backward) == trades
        assert forward_hops == grid.ring - 1
        assert backward_hops == 2 * (grid.ring - 1)


@each_grid
def test_recomputing_a_layer_trades_again_and_never_runs_the_ring_again(grid, counted):
    for found in counted[grid.world_size]:
        kept, plain = found[grid, torch.float32, "recomputed"], found[grid, torch.float32, "both"]
        assert kept[0] == plain[0]
        assert kept[1][1] == plain[1][1]


# ---- the operator ----


def check_operator(rank: int, members: int) -> dict[str, str]:
    """Schema, autograd and fake tensors, of tensors of two types."""
    here = members_of(rank, members)
    q, _, lse = whole(members, SIZES[0], torch.bfloat16)
    tensors = [q.requires_grad_(), lse.mT.unsqueeze(-1).requires_grad_()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    return torch.library.opcheck(
        ulysses.all_to_all_heads, (tensors, -3, -2, here.size, here.group), test_utils=checks
    )


def test_torch_accepts_the_operator():
    assert [set(of_rank.values()) for of_rank in run_ranks(2, check_operator)] == [{"SUCCESS"}] * 2


def compiled_and_plain(rank: int, members: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of a layer that the compiler takes whole, and of one that it never saw."""
    groups = ProcessGroups.build(Grid(ulysses=members), rank)
    attention = ContextParallelAttention(Layout("none", 5 * members, 1), "sdpa", groups)
    q, k, v, _ = oracle.random_inputs(BATCH, 5, HEADS, 1, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        out, lse = attention(*inputs)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    return list(zip(*(torch.autograd.grad(each(*inputs), inputs) for each in (compiled, loss))))


def test_the_compiler_takes_a_layer_whole():
    for gradients in run_ranks(2, compiled_and_plain):
        assert all(torch.equal(compiled, plain) for compiled, plain in gradients)


def odd_heads(rank: int, members: int) -> str:
    here = members_of(rank, members)
    q, k, v, _ = oracle.random_inputs(1, 4, 3, 3)
    with pytest.raises(AssertionError) as raised:
        ulysses.gather_tokens(q, torch.stack([k, v]), here)
    return str(raised.value)


def test_query_heads_that_members_cannot_share_are_our_own_fault():
    assert run_ranks(2, odd_heads) == ["query heads that cannot be shared out evenly"] * 2


def test_alone_nothing_is_copied():
    alone = ulysses.UlyssesGroup.of(None)
    q, kv, lse = whole(1, SIZES[0], torch.float32)
    assert all(
        given is kept
        for given, kept in zip(ulysses.gather_tokens(q, kv, alone), (q, kv), strict=True)
    )
    assert all(
        given is kept
        for given, kept in zip(ulysses.gather_heads(q, lse, alone), (q, lse), strict=True)
    )
