"""What the model calls: between real ranks against the oracle, and as an operator that torch understands."""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megatron_ring.context_parallel import attention
from megatron_ring.context_parallel.attention import ContextParallelAttention, ring_attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import (
    KERNELS,
    reference,
    stack_to_kernel_layout,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.state import accumulation_dtype
from megatron_ring.parallel import collectives
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.progress import ProgressTracker
from tests import oracle
from tests.distributed import run_ranks
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance


class Case(NamedTuple):
    """lengths: of the documents that the batch's samples are packed with; () is none. groups: the key-value heads.

    shard: the tokens of a ring rank.
    """

    layout: str
    stripe: int
    kernel: str
    dtype: torch.dtype
    groups: int = 2
    window: int = 0
    lengths: tuple[int, ...] = ()
    heads: int = 4
    shard: int = 12

    def on(self, ring_size: int) -> Layout:
        return Layout(self.layout, ring_size * self.shard, ring_size, self.stripe)


LAYOUTS = [("ring", 1), ("striped", 1), ("striped", 3), ("zigzag", 1)]
NUMBERS = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("reference", torch.float64)]
WHOLE, *SPARSE = [(0, ()), (0, (7, 1, 13)), (5, ()), (5, (7, 1, 13))]
CASES = [
    *(Case(*layout, *numbers) for layout in LAYOUTS for numbers in NUMBERS),
    # Backward, the queries of four groups travel, and the keys of two.
    *(
        Case(*layout, *numbers, groups, *narrowed)
        for layout in LAYOUTS
        for groups, numbers in [(4, NUMBERS[0]), (4, NUMBERS[2]), (2, NUMBERS[2])]
        for narrowed in SPARSE
    ),
]
# Of Ulysses members that are as many as the groups, more, or no divisor of them.
HEADS_AND_GROUPS = [
    (4, 4, SPARSE[0]),
    (4, 1, SPARSE[2]),
    (6, 3, WHOLE),
    (6, 3, SPARSE[2]),
    (12, 6, SPARSE[1]),
]
ULYSSES_CASES = [
    *(Case(*layout, *numbers) for layout in LAYOUTS for numbers in NUMBERS),
    *(
        Case(*layout, *NUMBERS[2], groups, *narrowed, heads)
        for layout in LAYOUTS
        for heads, groups, narrowed in HEADS_AND_GROUPS
    ),
    *(
        Case(*layout, *numbers, groups, *narrowed, heads=6, shard=15)
        for layout in [("ring", 1), ("striped", 1), ("striped", 5)]
        for numbers, groups, narrowed in zip(NUMBERS, (6, 2, 1), SPARSE)
    ),
]
# By world size: rings and Ulysses groups of one to four, and both at once.
GRIDS = {
    2: [Grid(ulysses=2)],
    3: [Grid(ring=3)],
    4: [
        Grid(ring=4),
        Grid(data=2, ring=2),
        Grid(ulysses=4),
        Grid(data=2, ulysses=2),
        Grid(ring=2, ulysses=2),
    ],
    6: [Grid(ring=3, ulysses=2), Grid(ring=2, ulysses=3)],
}
LENGTH, BATCH, HEADS, GROUPS = 12, 2, 4, 2
ALONE = ProcessGroups()


def cases_on(grid: Grid) -> list[Case]:
    """Those whose heads and shards the Ulysses members can share out."""
    cases = ULYSSES_CASES if grid.ulysses > 1 else CASES
    return [case for case in cases if case.heads % grid.ulysses == case.shard % grid.ulysses == 0]


def on_real_ranks(rank: int, world_size: int) -> dict:
    """This rank's output and gradients for every grid and case."""
    found = {}
    for grid in GRIDS[world_size]:
        groups = ProcessGroups.build(grid, rank)
        found |= {(grid, case): on_one_rank(case, grid, groups, rank) for case in cases_on(grid)}
    return found


def whole_inputs(case: Case, tokens: int) -> list[torch.Tensor]:
    """q, k, v and the gradients of the output and of the log-sum-exp, of every rank together."""
    inputs = oracle.random_inputs(BATCH, tokens, case.heads, case.groups, case.dtype)
    return [*inputs, oracle.random_dlse(inputs[0])]


def tokens_of(case: Case, grid: Grid, rank: int) -> torch.Tensor:
    at = grid.coordinates(rank)
    return case.on(grid.ring).positions(at.ring, at.ulysses, grid.ulysses)


def on_one_rank(case: Case, grid: Grid, groups: ProcessGroups, rank: int) -> oracle.Attention:
    layout, here = case.on(grid.ring), tokens_of(case, grid, rank)
    q, k, v, dout, dlse = whole_inputs(case, layout.seq_length)
    inputs, starts = [x[:, here].requires_grad_() for x in (q, k, v)], None
    if case.lengths:
        starts = oracle.document_starts(oracle.documents(BATCH, layout.seq_length, case.lengths))
    out, lse = ContextParallelAttention(layout, case.kernel, groups)(*inputs, case.window, starts)
    gradients = torch.autograd.grad((out, lse), inputs, (dout[:, here], dlse[..., here]))
    return oracle.Attention(out.detach(), *gradients, lse.detach())


@functools.cache
def expected_of(case: Case, tokens: int) -> oracle.Attention:
    """The oracle's, of the whole sequence."""
    *inputs, dlse = whole_inputs(case, tokens)
    document_BS = oracle.documents(BATCH, tokens, case.lengths or (tokens,))
    return oracle.attention(*inputs, oracle.visible(document_BS, case.window), dlse)


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict]]:
    """What every rank found, by world size."""
    return {world_size: run_ranks(world_size, on_real_ranks) for world_size in GRIDS}


def short(grid: Grid) -> str:
    return "x".join(f"{name}{size}" for name, size in grid.sizes._asdict().items() if size > 1)


@pytest.mark.parametrize(
    ("grid", "case"),
    [
        pytest.param(grid, case, id=f"{short(grid)}-{'-'.join(map(str, case))}")
        for grid in itertools.chain.from_iterable(GRIDS.values())
        for case in cases_on(grid)
    ],
)
def test_real_ranks_agree_with_the_oracle(grid, case, ranks):
    whole = expected_of(case, grid.ring * case.shard)
    for rank, found in enumerate(ranks[grid.world_size]):
        here = tokens_of(case, grid, rank)
        expected = oracle.Attention(*(x[:, here] for x in whole[:4]), whole.lse[..., here])
        assert beyond_tolerance(found[grid, case], expected, case.dtype) == {}
        assert {x.dtype for x in found[grid, case][:4]} == {case.dtype}
        assert found[grid, case].lse.dtype == accumulation_dtype(case.dtype)


@pytest.mark.parametrize("narrowed", [WHOLE, *SPARSE], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_alone_it_is_plain_attention(kernel, dtype, narrowed):
    case = Case("striped", 1, kernel, dtype, GROUPS, *narrowed)
    assert (
        beyond_tolerance(on_one_rank(case, Grid(), ALONE, 0), expected_of(case, case.shard), dtype)
        == {}
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_the_log_sum_exp_may_be_all_that_is_read(kernel, dtype):
    q, k, v, _ = oracle.random_inputs(BATCH, LENGTH, HEADS, GROUPS, dtype)
    dlse, inputs = oracle.random_dlse(q), [x.requires_grad_() for x in (q, k, v)]
    out, lse = ContextParallelAttention(Layout("none", LENGTH, 1), kernel, ALONE)(*inputs)
    gradients = torch.autograd.grad(lse, inputs, dlse)
    found = oracle.Attention(out.detach(), *gradients, lse.detach())
    expected = oracle.attention(q, k, v, torch.zeros_like(q), dlse_BHS=dlse)
    assert beyond_tolerance(found, expected, dtype) == {}


@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_views_are_as_good_as_contiguous_tensors(kernel):
    """Queries, keys and values cut from one projection, and a gradient that arrives transposed or expanded."""
    q, k, v, dout = oracle.random_inputs(BATCH, LENGTH, 4, 4)
    fused = torch.cat([q, k, v], dim=2).requires_grad_()
    out, lse = ContextParallelAttention(Layout("none", LENGTH, 1), kernel, ALONE)(
        *fused.chunk(3, dim=2)
    )
    expected = oracle.attention(q, k, v, dout)
    (dfused,) = torch.autograd.grad(
        out, fused, dout.transpose(0, 1).contiguous().transpose(0, 1), retain_graph=True
    )
    assert (
        beyond_tolerance(
            oracle.Attention(out.detach(), *dfused.chunk(3, dim=2), lse.detach()),
            expected,
            torch.float64,
        )
        == {}
    )
    (dfused,) = torch.autograd.grad(out.sum(), fused)
    ones = oracle.attention(q, k, v, torch.ones_like(q))
    assert (
        beyond_tolerance(
            oracle.Attention(out.detach(), *dfused.chunk(3, dim=2), lse.detach()),
            ones,
            torch.float64,
        )
        == {}
    )


@pytest.mark.parametrize(
    ("document_starts", "samples"), [(None, 1), (torch.tensor([0, 2, 6]), 2)], ids=["", "packed"]
)
def test_torch_accepts_the_operator(document_starts, samples):
    """Schema, autograd, fake tensors and tracing, forward and backward."""
    q, k, v, _ = oracle.random_inputs(1, LENGTH, HEADS, GROUPS, torch.float32)
    packing, layout = (document_starts, samples, 4), ("striped", 1, "sdpa", "")
    for inputs in (
        (q, torch.stack([k, v])),
        (to_kernel_layout("sdpa", q), stack_to_kernel_layout("sdpa", [k, v])),
    ):
        torch.library.opcheck(
            ring_attention, (*(x.requires_grad_() for x in inputs), *packing, *layout)
        )


class Counting:
    """The reference kernel, with a count of its forward passes."""

    backward = staticmethod(reference.backward)

    def __init__(self):
        self.forwards = 0

    def forward(self, *args):
        self.forwards += 1
        reference.forward(*args)


def keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op is torch.ops.megatron_ring.ring_attention.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("context_fn", "forwards_a_layer"),
    [
        (
            {"context_fn": functools.partial(create_selective_checkpoint_contexts, keep_attention)},
            1,
        ),
        ({}, 2),
    ],
    ids=["kept", "recomputed"],
)
def test_recomputing_a_layer_need_not_run_the_ring_again(context_fn, forwards_a_layer, monkeypatch):
    kernel, layers = Counting(), 3
    monkeypatch.setitem(KERNELS, "counting", kernel)
    attention = ContextParallelAttention(Layout("striped", LENGTH, 1), "counting", ALONE)
    x, *_, dout = oracle.random_inputs(BATCH, LENGTH, HEADS, HEADS)
    x.requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + attention(x.sin(), x.cos(), x.tanh())[0]

    def stack(apply) -> torch.Tensor:
        out = x
        for _ in range(layers):
            out = apply(out)
        return torch.autograd.grad(out, x, dout)[0]

    plain = stack(layer)
    kernel.forwards = 0
    recomputed = stack(lambda x: checkpoint(layer, x, use_reentrant=False, **context_fn))
    assert torch.equal(recomputed, plain)
    assert kernel.forwards == forwards_a_layer * layers


def test_queries_of_another_length_than_the_shard_are_our_own_fault():
    q, k, v, _ = oracle.random_inputs(BATCH, LENGTH, HEADS, GROUPS)
    with pytest.raises(AssertionError, match="queries of another length than the layout's shard"):
        ContextParallelAttention(Layout("none", LENGTH + 1, 1), "reference", ALONE)(q, k, v)


def own_keys_in_halves(rank: int, world_size: int) -> dict[str, bool]:
    links = ProcessGroups.build(Grid(ring=world_size), rank).ring_links
    names = " ".join(link.group_name for link in links)

    def in_halves() -> bool:
        q_BLHD, place = torch.ones(1, 4, 2, 8), ProgressTracker()
        return attention._ring(
            q_BLHD, None, 1, 0, "striped", 1, "reference", names, place
        ).in_halves

    found = {"within the machine": in_halves()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "reader_within", lambda group: None)
        return found | {"over a network": in_halves()}


def test_own_keys_are_met_in_halves_where_messages_are_slow():
    assert (
        run_ranks(2, own_keys_in_halves)
        == [{"within the machine": False, "over a network": True}] * 2
    )
