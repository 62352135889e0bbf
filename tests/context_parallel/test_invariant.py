"""Rings of one to eight ranks give the same bits, and the right ones, where sums are over the sample's own blocks."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch

from megatron_ring.context_parallel import invariant
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from tests import oracle, simulated_ring
from tests.distributed import run_ranks
from tests.tolerances import beyond_tolerance

SIZES = 1, 2, 4, 8
SAMPLES, HEADS = 2, 4


class Case(NamedTuple):
    """lengths: of the documents that the samples are packed with; () is none. lse_read: it has a gradient too."""

    kernel: str
    dtype: torch.dtype
    tokens: int = 56
    groups: int = 2
    window: int = 0
    lengths: tuple[int, ...] = ()
    lse_read: bool = False

    @property
    def document_BS(self) -> torch.Tensor:
        return oracle.documents(SAMPLES, self.tokens, self.lengths or (self.tokens,))

    @property
    def starts(self) -> torch.Tensor | None:
        return oracle.document_starts(self.document_BS) if self.lengths else None

    @property
    def mask(self) -> Mask:
        return (
            Mask(self.window, tuple(self.starts.tolist()), SAMPLES)
            if self.lengths
            else Mask(self.window)
        )

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, the output's gradient and that of the log-sum-exp."""
        inputs = oracle.random_inputs(SAMPLES, self.tokens, HEADS, self.groups, self.dtype)
        return *inputs, oracle.random_dlse(inputs[0]) if self.lse_read else None


CASES = [
    Case(kernel, dtype, *rest)
    for kernel in ("reference", "sdpa")
    for dtype in (torch.float32, torch.bfloat16)
    for rest in [(56, 4), (56, 1, 9), (56, 2, 0, (7, 13, 1)), (56, 2, 20, (30, 9), True)]
]
# Blocks of more than one of the kernel's tiles, and of one token.
CASES += [Case("sdpa", torch.float32, tokens) for tokens in (8 * 131, 8)]


@pytest.fixture
def by_blocks(monkeypatch) -> None:
    """Simulated rings reduce by blocks."""
    monkeypatch.setattr(ring_loop, "forward", invariant.forward)
    monkeypatch.setattr(ring_loop, "backward", invariant.backward)


def of_ring(case: Case, size: int, layout: str = "striped") -> oracle.Attention:
    *inputs, dlse = case.inputs()
    layout = Layout(layout, case.tokens, size)
    return simulated_ring.run(layout, KERNELS[case.kernel], *inputs, case.mask, dlse).results


def differing(first: oracle.Attention, second: oracle.Attention) -> list[str]:
    return [name for name, x, y in zip(first._fields, first, second) if not torch.equal(x, y)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_bits_are_the_same_and_right_for_every_size(case, by_blocks):
    found = {size: of_ring(case, size) for size in SIZES}
    assert {size: differing(found[1], found[size]) for size in SIZES} == {
        size: [] for size in SIZES
    }
    *inputs, dlse = case.inputs()
    expected = oracle.attention(*inputs, oracle.visible(case.document_BS, case.window), dlse)
    assert beyond_tolerance(found[1], expected, case.dtype) == {}


@pytest.mark.parametrize("name", ["none", "ring", "zigzag"])
def test_one_process_has_them_too_whatever_its_layout(name, by_blocks):
    case = CASES[0]
    assert differing(of_ring(case, 1, name), of_ring(case, 8)) == []


class CountingKernel:
    """A kernel that counts its calls by direction and by the numbers of queries and keys."""

    def __init__(self):
        self.calls: Counter[tuple[str, int, int]] = Counter()

    def forward(self, q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, *rest: object) -> None:
        self.calls["forward", q_BLHD.shape[1], k_BLGD.shape[1]] += 1
        reference.forward(q_BLHD, k_BLGD, *rest)

    def backward(
        self, dout_BLHD: torch.Tensor, q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, *rest: object
    ) -> None:
        self.calls["backward", q_BLHD.shape[1], k_BLGD.shape[1]] += 1
        reference.backward(dout_BLHD, q_BLHD, k_BLGD, *rest)


def calls_of_ring(size: int) -> Counter[tuple[str, int, int]]:
    kernel = CountingKernel()
    *inputs, _ = Case("reference", torch.float32).inputs()
    simulated_ring.run(Layout("striped", 56, size), kernel, *inputs)
    return kernel.calls


def test_every_size_makes_the_same_calls_between_the_same_blocks(by_blocks):
    """The reason for equal bits, which holds on every processor."""
    calls = {size: calls_of_ring(size) for size in SIZES}
    assert {(queries, keys) for _, queries, keys in calls[1]} == {(7, 7)}
    assert all(calls[size] == calls[1] for size in SIZES)


def test_in_order_of_arrival_the_calls_depend_on_the_size():
    assert {size for _, size, _ in calls_of_ring(1)}.isdisjoint(
        {size for _, size, _ in calls_of_ring(8)}
    )


@pytest.mark.parametrize("size", SIZES)
def test_the_keys_go_around_once_and_their_gradients_come_home(size, by_blocks):
    *inputs, _ = Case("reference", torch.float32).inputs()
    exchanges = simulated_ring.run(Layout("striped", 56, size), reference, *inputs).exchanges
    around, home = size - 1, size if size > 1 else 0
    assert [len(sent) for sent in exchanges.forward] == [around] * size
    assert [len(sent) for sent in exchanges.backward] == [around + home] * size


REAL = Case("sdpa", torch.bfloat16, window=20, lengths=(30, 9))


def on_real_ranks(rank: int, world_size: int) -> oracle.Attention:
    """This rank's results in the order of its tokens."""
    layout = Layout("striped", REAL.tokens, world_size)
    attend = ContextParallelAttention(
        layout, REAL.kernel, ProcessGroups.build(Grid(ring=world_size), rank), reduction="invariant"
    )
    here = layout.positions(rank)
    q, k, v, dout, _ = (None if x is None else x[:, here] for x in REAL.inputs())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*inputs, REAL.window, REAL.starts)
    return oracle.Attention(out.detach(), *torch.autograd.grad(out, inputs, dout), lse.detach())


def test_real_ranks_have_the_bits_of_one_process():
    whole = run_ranks(1, on_real_ranks)[0]
    for world_size in (2, 4):
        for rank, found in enumerate(run_ranks(world_size, on_real_ranks)):
            here = Layout("striped", REAL.tokens, world_size).positions(rank)
            expected = oracle.Attention(*(x[:, here] for x in whole[:4]), whole.lse[..., here])
            assert differing(found, expected) == []
