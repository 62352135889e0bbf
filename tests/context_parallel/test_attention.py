"""ContextParallelAttention between real ranks against the oracle, and as an operator of torch."""

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
from megatron_ring.context_parallel.attention import (
    ContextParallelAttention,
    RingSpec,
    ring_attention,
)
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import (
    KERNELS,
    reference,
    stack_to_kernel_layout,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from megatron_ring.parallel import collectives
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.progress import ProgressTracker
from tests import oracle
from tests.distributed import run_ranks
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance


class Case(NamedTuple):
    """What is computed, apart from the grid.

    Attributes:
        groups: number of key-value heads.
        lengths: of the documents with which the samples are packed; () for no packing.
        shard: number of tokens of a ring rank.
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
KERNEL_DTYPES = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("reference", torch.float64)]
CAUSAL = (0, ())  # window and document lengths
SPARSE = [(0, (7, 1, 13)), (5, ()), (5, (7, 1, 13))]
CASES = [
    *(Case(*layout, *kernel) for layout in LAYOUTS for kernel in KERNEL_DTYPES),
    # In backward the queries travel with four groups, and the keys with two.
    *(
        Case(*layout, *kernel, groups, *mask)
        for layout in LAYOUTS
        for groups, kernel in [(4, KERNEL_DTYPES[0]), (4, KERNEL_DTYPES[2]), (2, KERNEL_DTYPES[2])]
        for mask in SPARSE
    ),
]
# The number of Ulysses ranks equals that of groups, exceeds it, or does not divide it.
HEADS_AND_GROUPS = [
    (4, 4, SPARSE[0]),
    (4, 1, SPARSE[2]),
    (6, 3, CAUSAL),
    (6, 3, SPARSE[2]),
    (12, 6, SPARSE[1]),
]
ULYSSES_CASES = [
    *(Case(*layout, *kernel) for layout in LAYOUTS for kernel in KERNEL_DTYPES),
    *(
        Case(*layout, *KERNEL_DTYPES[2], groups, *mask, heads)
        for layout in LAYOUTS
        for heads, groups, mask in HEADS_AND_GROUPS
    ),
    *(
        Case(*layout, *kernel, groups, *mask, heads=6, shard=15)
        for layout in [("ring", 1), ("striped", 1), ("striped", 5)]
        for kernel, groups, mask in zip(KERNEL_DTYPES, (6, 2, 1), SPARSE)
    ),
]
# By world size: rings and Ulysses groups of one to four ranks, and both at once.
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
LENGTH = 12
BATCH = 2
HEADS = 4
GROUPS = 2
NO_GROUPS = ProcessGroups()


def cases_on(grid: Grid) -> list[Case]:
    """Return the cases whose heads and shards the Ulysses ranks divide."""
    cases = ULYSSES_CASES if grid.ulysses > 1 else CASES
    return [case for case in cases if case.heads % grid.ulysses == case.shard % grid.ulysses == 0]


def on_real_ranks(rank: int, world_size: int) -> dict:
    """Return this rank's output and gradients for every grid and case."""
    results = {}
    for grid in GRIDS[world_size]:
        groups = ProcessGroups.build(grid, rank)
        for case in cases_on(grid):
            results[grid, case] = on_one_rank(case, grid, groups, rank)
    return results


def whole_inputs(case: Case, tokens: int) -> list[torch.Tensor]:
    """Return q, k, v and the gradients of output and log-sum-exp, for the whole sequence."""
    inputs = oracle.random_inputs(BATCH, tokens, case.heads, case.groups, case.dtype)
    return [*inputs, oracle.random_dlse(inputs[0])]


def positions_of(case: Case, grid: Grid, rank: int) -> torch.Tensor:
    at = grid.coordinates(rank)
    return case.on(grid.ring).positions(at.ring, at.ulysses, grid.ulysses)


def on_one_rank(case: Case, grid: Grid, groups: ProcessGroups, rank: int) -> oracle.Attention:
    layout = case.on(grid.ring)
    local = positions_of(case, grid, rank)
    q, k, v, dout, dlse = whole_inputs(case, layout.seq_length)
    inputs = [x[:, local].requires_grad_() for x in (q, k, v)]
    starts = None
    if case.lengths:
        starts = oracle.document_starts(oracle.documents(BATCH, layout.seq_length, case.lengths))
    out, lse = ContextParallelAttention(layout, case.kernel, groups)(*inputs, case.window, starts)
    gradients = torch.autograd.grad((out, lse), inputs, (dout[:, local], dlse[..., local]))
    return oracle.Attention(out.detach(), *gradients, lse.detach())


@functools.cache
def expected_of(case: Case, tokens: int) -> oracle.Attention:
    """Return the oracle's result for the whole sequence."""
    *inputs, dlse = whole_inputs(case, tokens)
    document_BS = oracle.documents(BATCH, tokens, case.lengths or (tokens,))
    return oracle.attention(*inputs, oracle.visible(document_BS, case.window), dlse)


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict]]:
    """The results of every rank, by world size."""
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
def test_real_ranks_agree_with_the_oracle(grid, case, results):
    whole = expected_of(case, grid.ring * case.shard)
    for rank, of_rank in enumerate(results[grid.world_size]):
        local = positions_of(case, grid, rank)
        expected = oracle.Attention(*(x[:, local] for x in whole[:4]), whole.lse[..., local])
        result = of_rank[grid, case]
        assert beyond_tolerance(result, expected, case.dtype) == {}
        assert {x.dtype for x in result[:4]} == {case.dtype}
        assert result.lse.dtype == accumulation_dtype(case.dtype)


@pytest.mark.parametrize("mask", [CAUSAL, *SPARSE], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_on_a_single_process_it_is_plain_attention(kernel, dtype, mask):
    case = Case("striped", 1, kernel, dtype, GROUPS, *mask)
    result = on_one_rank(case, Grid(), NO_GROUPS, 0)
    assert beyond_tolerance(result, expected_of(case, case.shard), dtype) == {}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_gradients_are_right_if_only_the_log_sum_exp_has_one(kernel, dtype):
    q, k, v, _ = oracle.random_inputs(BATCH, LENGTH, HEADS, GROUPS, dtype)
    dlse = oracle.random_dlse(q)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ContextParallelAttention(Layout("none", LENGTH, 1), kernel, NO_GROUPS)(*inputs)
    gradients = torch.autograd.grad(lse, inputs, dlse)
    result = oracle.Attention(out.detach(), *gradients, lse.detach())
    expected = oracle.attention(q, k, v, torch.zeros_like(q), dlse_BHS=dlse)
    assert beyond_tolerance(result, expected, dtype) == {}


@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_views_give_the_same_results_as_contiguous_tensors(kernel):
    """q, k and v are views of one projection; dout is transposed, or expanded from a sum."""
    q, k, v, dout = oracle.random_inputs(BATCH, LENGTH, 4, 4)
    fused = torch.cat([q, k, v], dim=2).requires_grad_()
    attention = ContextParallelAttention(Layout("none", LENGTH, 1), kernel, NO_GROUPS)
    out, lse = attention(*fused.chunk(3, dim=2))

    def result(dfused: torch.Tensor) -> oracle.Attention:
        return oracle.Attention(out.detach(), *dfused.chunk(3, dim=2), lse.detach())

    transposed = dout.transpose(0, 1).contiguous().transpose(0, 1)
    (dfused,) = torch.autograd.grad(out, fused, transposed, retain_graph=True)
    expected = oracle.attention(q, k, v, dout)
    assert beyond_tolerance(result(dfused), expected, torch.float64) == {}
    (dfused,) = torch.autograd.grad(out.sum(), fused)
    expected = oracle.attention(q, k, v, torch.ones_like(q))
    assert beyond_tolerance(result(dfused), expected, torch.float64) == {}


SPECS = [
    RingSpec("striped", "sdpa"),
    RingSpec("zigzag", "flash", "invariant", ("12", "abc"), 256, 4096, 3, 31),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_survives_being_packed_into_operator_arguments(spec):
    assert RingSpec.from_op_arguments(*spec.to_op_arguments()) == spec


@pytest.mark.parametrize(
    ("document_starts", "samples"), [(None, 1), (torch.tensor([0, 2, 6]), 2)], ids=["", "packed"]
)
def test_torch_accepts_the_operator(document_starts, samples):
    """opcheck: schema, autograd, fake tensors and tracing, forward and backward."""
    q, k, v, _ = oracle.random_inputs(1, LENGTH, HEADS, GROUPS, torch.float32)
    spec = RingSpec("striped", "sdpa", window=4, samples=samples)
    for inputs in (
        (q, torch.stack([k, v])),
        (to_kernel_layout("sdpa", q), stack_to_kernel_layout("sdpa", [k, v])),
    ):
        tensors = [x.requires_grad_() for x in inputs]
        arguments = (*tensors, document_starts, None, *spec.to_op_arguments())
        torch.library.opcheck(ring_attention, arguments)


def test_torch_refuses_autograd_for_an_operator_that_declares_a_mutation():
    """The reason why the schema does not declare its writes to progress (docs/decisions/0022).

    If this test fails, torch allows it and the decision can be revisited.
    """

    @torch.library.custom_op("megatron_ring_tests::writes_progress", mutates_args=("progress",))
    def writes_progress(x: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(RuntimeError, match="non-functional operator"):
        writes_progress.register_autograd(lambda ctx, dx: (dx, None))


class CountingKernel:
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
    ("context_fn", "forwards_per_layer"),
    [
        (
            {"context_fn": functools.partial(create_selective_checkpoint_contexts, keep_attention)},
            1,
        ),
        ({}, 2),
    ],
    ids=["saved", "recomputed"],
)
def test_selective_checkpointing_does_not_run_the_ring_again(
    context_fn, forwards_per_layer, monkeypatch
):
    kernel = CountingKernel()
    layers = 3
    monkeypatch.setitem(KERNELS, "counting", kernel)
    attention = ContextParallelAttention(Layout("striped", LENGTH, 1), "counting", NO_GROUPS)
    x, *_, dout = oracle.random_inputs(BATCH, LENGTH, HEADS, HEADS)
    x.requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + attention(x.sin(), x.cos(), x.tanh())[0]

    def stack(apply) -> torch.Tensor:
        out = x
        for _ in range(layers):
            out = apply(out)
        return torch.autograd.grad(out, x, dout)[0]

    without_checkpointing = stack(layer)
    kernel.forwards = 0
    recomputed = stack(lambda x: checkpoint(layer, x, use_reentrant=False, **context_fn))
    assert torch.equal(recomputed, without_checkpointing)
    assert kernel.forwards == forwards_per_layer * layers


def test_queries_of_another_length_than_the_shard_fail_an_assertion():
    q, k, v, _ = oracle.random_inputs(BATCH, LENGTH, HEADS, GROUPS)
    attention = ContextParallelAttention(Layout("none", LENGTH + 1, 1), "reference", NO_GROUPS)
    with pytest.raises(AssertionError, match=rf"length {LENGTH}.* shard has {LENGTH + 1}"):
        attention(q, k, v)


def splits_own_keys(rank: int, world_size: int) -> dict[str, bool]:
    """Return whether backward splits the work on own keys, by how messages travel."""
    links = ProcessGroups.build(Grid(ring=world_size), rank).ring_links
    spec = RingSpec("striped", "reference", links=tuple(link.group_name for link in links))

    def splits_own_work() -> bool:
        return attention._ring(
            torch.ones(1, 4, 2, 8), None, ProgressTracker(), spec
        ).splits_own_work

    within_machine = splits_own_work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "peer_memory_reader", lambda group: None)
        return {"within the machine": within_machine, "over a network": splits_own_work()}


def test_work_on_own_keys_is_split_in_halves_only_if_messages_are_slow():
    expected = {"within the machine": False, "over a network": True}
    assert run_ranks(2, splits_own_keys) == [expected] * 2
