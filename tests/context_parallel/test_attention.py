"""What the model calls: between real ranks against the oracle, and as an operator that torch understands."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_ring.context_parallel.attention import ContextParallelAttention, ring_attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from tests import oracle
from tests.distributed import run_ranks
from tests.tolerances import TOLERANCE, beyond_tolerance


class Case(NamedTuple):
    layout: str
    stripe: int
    kernel: str
    dtype: torch.dtype


class Gradients(NamedTuple):
    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


CASES = [
    Case(layout, stripe, kernel, dtype)
    for layout, stripe in [("ring", 1), ("striped", 1), ("striped", 3), ("zigzag", 1)]
    for kernel, dtype in [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("reference", torch.float64)]
]
GRIDS = {3: [Grid(ring=3)], 4: [Grid(ring=4), Grid(data=2, ring=2)]}  # by world size: rings of two, three and four
LENGTH, BATCH, HEADS, GROUPS = 12, 2, 4, 2
ALONE = ProcessGroups(data_context=None, ring_links=None)


def on_real_ranks(rank: int, world_size: int) -> dict:
    """This rank's output and gradients for every grid and case."""
    found = {}
    for grid in GRIDS[world_size]:
        groups, ring_rank = ProcessGroups.build(grid, rank), grid.coordinates(rank).ring
        found |= {(grid, case): on_one_rank(case, grid.ring, groups, ring_rank) for case in CASES}
    return found


def on_one_rank(case: Case, ring_size: int, groups: ProcessGroups, ring_rank: int) -> Gradients:
    layout = Layout(case.layout, ring_size * LENGTH, ring_size, case.stripe)
    here = layout.positions(ring_rank)
    q, k, v, dout = (x[:, here] for x in oracle.random_inputs(BATCH, layout.seq_length, HEADS, GROUPS, case.dtype))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = ContextParallelAttention(layout, case.kernel, groups)(*inputs)
    return Gradients(out.detach(), *torch.autograd.grad(out, inputs, dout))


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict]]:
    """What every rank found, by world size."""
    return {world_size: run_ranks(world_size, on_real_ranks) for world_size in GRIDS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}-{case.stripe}-{case.kernel}-{case.dtype}")
@pytest.mark.parametrize("grid", [grid for grids in GRIDS.values() for grid in grids], ids=str)
def test_real_ranks_agree_with_the_oracle(grid, case, ranks):
    inputs = oracle.random_inputs(BATCH, grid.ring * LENGTH, HEADS, GROUPS, case.dtype)
    whole = Gradients(*oracle.attention(*inputs)[:4])
    layout = Layout(case.layout, grid.ring * LENGTH, grid.ring, case.stripe)
    for rank, found in enumerate(ranks[grid.world_size]):
        here = layout.positions(grid.coordinates(rank).ring)
        expected = Gradients(*(x[:, here] for x in whole))
        assert beyond_tolerance(found[grid, case], expected, case.dtype) == {}
        assert {x.dtype for x in found[grid, case]} == {case.dtype}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_alone_it_is_plain_attention(kernel, dtype):
    found = on_one_rank(Case("striped", 1, kernel, dtype), 1, ALONE, 0)
    expected = oracle.attention(*oracle.random_inputs(BATCH, LENGTH, HEADS, GROUPS, dtype))
    assert beyond_tolerance(found, expected, dtype) == {}


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_are_as_good_as_contiguous_tensors(kernel):
    """Queries, keys and values cut from one projection, and a gradient that arrives transposed or expanded."""
    q, k, v, dout = oracle.random_inputs(BATCH, LENGTH, 4, 4)
    fused = torch.cat([q, k, v], dim=2).requires_grad_()
    out = ContextParallelAttention(Layout("none", LENGTH, 1), kernel, ALONE)(*fused.chunk(3, dim=2))
    expected = oracle.attention(q, k, v, dout)
    (dfused,) = torch.autograd.grad(out, fused, dout.transpose(0, 1).contiguous().transpose(0, 1), retain_graph=True)
    assert beyond_tolerance(Gradients(out.detach(), *dfused.chunk(3, dim=2)), expected, torch.float64) == {}
    (dfused,) = torch.autograd.grad(out.sum(), fused)
    ones = oracle.attention(q, k, v, torch.ones_like(q))
    assert beyond_tolerance(Gradients(out.detach(), *dfused.chunk(3, dim=2)), ones, torch.float64) == {}


def test_torch_accepts_the_operator():
    """Schema, autograd, fake tensors and tracing, forward and backward."""
    q, k, v, _ = oracle.random_inputs(BATCH, LENGTH, HEADS, GROUPS, torch.float32)
    kv = torch.stack([k, v])
    torch.library.opcheck(ring_attention, (q.requires_grad_(), kv.requires_grad_(), "striped", 1, "sdpa", ""))


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
        ({"context_fn": partial(create_selective_checkpoint_contexts, keep_attention)}, 1),
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
        return x + attention(x.sin(), x.cos(), x.tanh())

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
