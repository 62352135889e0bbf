"""With the invariant reduction, rings of 1, 2, 4 and 8 ranks give the same, correct bits."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch

from megatron_ring.context_parallel import invariant
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.kernels.attention import KERNELS, HopInputs, reference
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from tests import oracle, simulated_ring
from tests.distributed import run_ranks
from tests.tolerances import beyond_tolerance

SIZES = 1, 2, 4, 8
SAMPLES, HEADS = 2, 4


class Case(NamedTuple):
    """What is computed, apart from the ring size.

    Attributes:
        lengths: of the documents with which the samples are packed; () for no packing.
        with_dlse: whether the log-sum-exp has a gradient too.
    """

    kernel: str
    dtype: torch.dtype
    tokens: int = 56
    groups: int = 2
    window: int = 0
    lengths: tuple[int, ...] = ()
    with_dlse: bool = False

    @property
    def document_BS(self) -> torch.Tensor:
        return oracle.documents(SAMPLES, self.tokens, self.lengths or (self.tokens,))

    @property
    def starts(self) -> torch.Tensor | None:
        return oracle.document_starts(self.document_BS) if self.lengths else None

    @property
    def mask(self) -> Mask:
        if not self.lengths:
            return Mask(self.window)
        return Mask(self.window, tuple(self.starts.tolist()), SAMPLES)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Return q, k, v, and the gradients of the output and of the log-sum-exp, if it has one."""
        inputs = oracle.random_inputs(SAMPLES, self.tokens, HEADS, self.groups, self.dtype)
        return *inputs, oracle.random_dlse(inputs[0]) if self.with_dlse else None


CASES = [
    Case(kernel, dtype, *rest)
    for kernel in ("reference", "sdpa")
    for dtype in (torch.float32, torch.bfloat16)
    for rest in [(56, 4), (56, 1, 9), (56, 2, 0, (7, 13, 1)), (56, 2, 20, (30, 9), True)]
]
# Blocks of more than one kernel tile, and of one token.
CASES += [Case("sdpa", torch.float32, tokens) for tokens in (8 * 131, 8)]


@pytest.fixture
def invariant_reduction(monkeypatch) -> None:
    """Simulated rings use the invariant reduction."""
    monkeypatch.setattr(ring_loop, "forward", invariant.forward)
    monkeypatch.setattr(ring_loop, "backward", invariant.backward)


def result_of_ring(case: Case, size: int, layout_name: str = "striped") -> oracle.Attention:
    *inputs, dlse = case.inputs()
    layout = Layout(layout_name, case.tokens, size)
    return simulated_ring.run(layout, KERNELS[case.kernel], *inputs, case.mask, dlse).results


def differing_fields(first: oracle.Attention, second: oracle.Attention) -> list[str]:
    return [name for name, x, y in zip(first._fields, first, second) if not torch.equal(x, y)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_bits_are_equal_for_every_ring_size_and_within_tolerance(case, invariant_reduction):
    results = {size: result_of_ring(case, size) for size in SIZES}
    for size in SIZES:
        assert differing_fields(results[1], results[size]) == [], f"ring of {size}"
    *inputs, dlse = case.inputs()
    expected = oracle.attention(*inputs, oracle.visible(case.document_BS, case.window), dlse)
    assert beyond_tolerance(results[1], expected, case.dtype) == {}


@pytest.mark.parametrize("name", ["none", "ring", "zigzag"])
def test_a_single_process_has_the_same_bits_with_any_layout(name, invariant_reduction):
    case = CASES[0]
    assert differing_fields(result_of_ring(case, 1, name), result_of_ring(case, 8)) == []


class CountingKernel:
    """The reference kernel; counts calls by direction and by numbers of queries and keys."""

    def __init__(self):
        self.calls: Counter[tuple[str, int, int]] = Counter()

    def forward(self, inputs: HopInputs, *rest: object) -> None:
        self.calls["forward", inputs.q_BLHD.shape[1], inputs.k_BLGD.shape[1]] += 1
        reference.forward(inputs, *rest)

    def backward(self, inputs: HopInputs, *rest: object) -> None:
        self.calls["backward", inputs.q_BLHD.shape[1], inputs.k_BLGD.shape[1]] += 1
        reference.backward(inputs, *rest)


def kernel_calls(size: int) -> Counter[tuple[str, int, int]]:
    kernel = CountingKernel()
    *inputs, _ = Case("reference", torch.float32).inputs()
    simulated_ring.run(Layout("striped", 56, size), kernel, *inputs)
    return kernel.calls


def test_every_ring_size_makes_the_same_kernel_calls(invariant_reduction):
    """The reason for equal bits, which holds on every processor."""
    calls = {size: kernel_calls(size) for size in SIZES}
    assert {(queries, keys) for _, queries, keys in calls[1]} == {(7, 7)}
    assert all(calls[size] == calls[1] for size in SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_kernels_must_add_gradients_in_a_fixed_order(size, invariant_reduction):
    """Ranks are threads here, so this also tests overlapping changes of the process's setting."""
    settings = set()

    class RecordingKernel(CountingKernel):
        def backward(self, *arguments: object) -> None:
            settings.add(torch.are_deterministic_algorithms_enabled())
            super().backward(*arguments)

    *inputs, _ = Case("reference", torch.float32).inputs()
    simulated_ring.run(Layout("striped", 56, size), RecordingKernel(), *inputs)
    assert settings == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_with_the_arrival_reduction_kernel_calls_depend_on_the_ring_size():
    queries_of_one = {queries for _, queries, _ in kernel_calls(1)}
    queries_of_eight = {queries for _, queries, _ in kernel_calls(8)}
    assert queries_of_one.isdisjoint(queries_of_eight)


@pytest.mark.parametrize("size", SIZES)
def test_keys_go_around_once_and_their_gradients_return(size, invariant_reduction):
    *inputs, _ = Case("reference", torch.float32).inputs()
    exchanges = simulated_ring.run(Layout("striped", 56, size), reference, *inputs).exchanges
    of_keys = size - 1
    of_gradients = size if size > 1 else 0
    assert [len(sent) for sent in exchanges.forward] == [of_keys] * size
    assert [len(sent) for sent in exchanges.backward] == [of_keys + of_gradients] * size


CASE_OF_REAL_RANKS = Case("sdpa", torch.bfloat16, window=20, lengths=(30, 9))


def on_real_ranks(rank: int, world_size: int) -> oracle.Attention:
    """Return this rank's results in the order of its tokens."""
    case = CASE_OF_REAL_RANKS
    layout = Layout("striped", case.tokens, world_size)
    groups = ProcessGroups.build(Grid(ring=world_size), rank)
    attention = ContextParallelAttention(layout, case.kernel, groups, reduction="invariant")
    local = layout.positions(rank)
    q, k, v, dout = (x[:, local] for x in case.inputs()[:4])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs, case.window, case.starts)
    return oracle.Attention(out.detach(), *torch.autograd.grad(out, inputs, dout), lse.detach())


def test_real_ranks_have_the_bits_of_one_process():
    whole = run_ranks(1, on_real_ranks)[0]
    for world_size in (2, 4):
        layout = Layout("striped", CASE_OF_REAL_RANKS.tokens, world_size)
        for rank, result in enumerate(run_ranks(world_size, on_real_ranks)):
            local = layout.positions(rank)
            expected = oracle.Attention(*(x[:, local] for x in whole[:4]), whole.lse[..., local])
            assert differing_fields(result, expected) == []


@pytest.mark.parametrize("size", [2, 4, 8])
def test_monitoring_gets_the_rank_from_which_keys_have_travelled(size):
    sources = []
    layout = Layout("striped", 8 * size, size)
    mask = Mask(document_starts=(0, 9))
    ring = ring_loop.Ring(
        layout,
        ring_rank=1,
        kernel=reference,
        scale=1.0,
        exchange=object(),
        mask=mask,
        on_hop=lambda hop, hops, source: sources.append(source),
    )
    travelled = [hop.distance for hop in invariant._hops(ring)]
    assert sorted(sources) == list(range(size))
    after = [(source - distance) % size for source, distance in zip(sources, travelled)]
    assert after == [*sources[1:], 1]
