"""Attention is exact for any documents, window and layout, whether keys or queries travel.

Rings of one to eight ranks against the oracle, forward and backward: named cases that have been
difficult, and many more that hypothesis draws.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.context_parallel.hop_cost import queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.kernels.attention import KERNELS
from tests import oracle, simulated_ring
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance

TOKENS, HEADS = 130, 4
HEAD_DIM = 8
# Number of key-value heads with which each of them travels in backward, being fewer bytes.
GROUPS = {"queries": [4], "keys": [1, 2]}


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        lengths: of the documents, repeated through the concatenated samples; () for no packing.
        zero_dout_every: every n-th token's output has no gradient; 0 if all have one.
        with_dlse: whether the log-sum-exp has a gradient.
    """

    layout: Layout
    lengths: tuple[int, ...] = ()
    window: int = 0
    samples: int = 1
    groups: int = 4
    dtype: torch.dtype = torch.float64
    kernel: str = "sdpa"
    zero_dout_every: int = 0
    with_dlse: bool = True

    @property
    def document_BS(self) -> torch.Tensor:
        tokens = self.layout.seq_length
        return oracle.documents(self.samples, tokens, self.lengths or (tokens,))

    @property
    def mask(self) -> Mask:
        if not self.lengths:
            return Mask(self.window)
        starts = oracle.document_starts(self.document_BS).tolist()
        return Mask(self.window, tuple(starts), self.samples)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        q, k, v, dout = oracle.random_inputs(
            self.samples, self.layout.seq_length, HEADS, self.groups, self.dtype, HEAD_DIM
        )
        if self.zero_dout_every:
            dout[:, :: self.zero_dout_every] = 0
        return q, k, v, dout

    @property
    def travels(self) -> str:
        q, k, v, _ = self.inputs()
        return "queries" if queries_are_lighter(q, torch.stack([k, v])) else "keys"


def mistakes(case: Case) -> dict[str, float]:
    """Return which of output, log-sum-exp and gradients differ from the oracle, and by how much."""
    inputs = case.inputs()
    dlse = oracle.random_dlse(inputs[0]) if case.with_dlse else None
    run = simulated_ring.run(
        case.layout, KERNELS[case.kernel], *inputs, mask=case.mask, dlse_BHS=dlse
    )
    expected = oracle.attention(*inputs, oracle.visible(case.document_BS, case.window), dlse)
    return beyond_tolerance(run.results, expected, case.dtype)


@st.composite
def layouts(draw, name: str) -> Layout:
    ring_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    stripe = draw(st.sampled_from([1, 2, 3, 5, 16])) if name == "striped" else 1
    unit = ring_size * stripe * (2 if name == "zigzag" else 1)
    return Layout(name, unit * draw(st.integers(1, TOKENS // unit)), ring_size, stripe)


def documents_in(layout: Layout) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw lengths: single tokens, fewer than ranks, primes, shards, whole samples, and any."""
    ring_size, tokens = layout.ring_size, layout.seq_length
    lengths = st.one_of(
        st.just(1),
        st.integers(1, ring_size),
        st.sampled_from([7, 13, 31, layout.shard_length, tokens]),
        st.integers(1, tokens),
    )
    return st.lists(lengths, min_size=1, max_size=12).map(tuple)


def windows_in(layout: Layout) -> st.SearchStrategy[int]:
    ring_size, shard, tokens = layout.ring_size, layout.shard_length, layout.seq_length
    return st.one_of(
        st.sampled_from([1, 2, ring_size, shard, shard + 1, tokens, 2 * tokens]),
        st.integers(1, tokens),
    )


@st.composite
def cases(draw, name: str, mask: str, travels: str) -> Case:
    layout = draw(layouts(name))
    return Case(
        layout,
        lengths=draw(documents_in(layout)) if "documents" in mask else (),
        window=draw(windows_in(layout)) if "window" in mask else 0,
        samples=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from(GROUPS[travels])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        kernel=draw(st.sampled_from(list(FAST_KERNELS))),
        zero_dout_every=draw(st.sampled_from([0, 3, 1])),
        with_dlse=draw(st.booleans()),
    )


each_traveller = pytest.mark.parametrize("travels", GROUPS)
each_kernel = pytest.mark.parametrize("kernel", FAST_KERNELS)


@each_traveller
@pytest.mark.parametrize("mask", ["causal", "documents", "window", "window in documents"])
@pytest.mark.parametrize("name", ["ring", "striped", "zigzag"])
@settings(max_examples=24)
@given(data=st.data())
def test_any_documents_window_and_layout_are_exact(name, mask, travels, data):
    case = data.draw(cases(name, mask, travels))
    assert case.travels == travels
    assert mistakes(case) == {}


DIFFICULT_CASES = {
    "documents shorter than the ring, so that ranks hold none of their tokens": Case(
        Layout("striped", 40, 8), (1, 2, 3, 5)
    ),
    "documents within a rank": Case(Layout("ring", 40, 4), (5,)),
    "documents across two ranks": Case(Layout("ring", 40, 4), (5, 10)),
    "documents within a stripe": Case(Layout("striped", 64, 4, stripe_size=16), (4,)),
    "documents within a chunk": Case(Layout("zigzag", 64, 4), (3, 5)),
    "a window of one": Case(Layout("striped", 24, 4), window=1),
    "a window of one in chunks": Case(Layout("zigzag", 24, 4), window=1),
    "a window of one in shards": Case(Layout("ring", 24, 4), window=1),
    "documents of one token": Case(Layout("striped", 24, 4), (1,), samples=2),
    "documents of one token in stripes": Case(
        Layout("striped", 24, 4, stripe_size=3), (1,), samples=2
    ),
    "documents of one token in shards": Case(Layout("ring", 24, 4), (1,), samples=2),
    "documents that the samples' edges cut": Case(
        Layout("striped", 24, 3, stripe_size=2), (17,), samples=3
    ),
    "a document longer than samples": Case(Layout("zigzag", 24, 3), (60, 7), samples=3),
    "samples of one document": Case(Layout("striped", 24, 3), (24,), samples=3),
    "a prime number of tokens in each": Case(Layout("zigzag", 96, 8), (7, 13, 31), samples=2),
    "a window of the ring's size": Case(Layout("striped", 40, 8), window=8),
    "a window below the ring's size": Case(Layout("striped", 40, 8), window=5),
    "a window longer than a shard": Case(Layout("striped", 40, 4), window=11),
    "a window longer than the documents": Case(Layout("striped", 40, 4), (7, 3), window=9),
    "a window of the whole sample": Case(Layout("zigzag", 40, 4), window=40),
    "a window beyond the sample": Case(Layout("ring", 40, 4), (7, 25), window=1000),
    "a ring of one": Case(Layout("none", 40, 1), (7, 25), window=5, samples=3),
    "one token on each rank": Case(Layout("striped", 8, 8), (3, 2)),
    "tiles cut at documents": Case(Layout("striped", 600, 2), (310, 7, 283), samples=2),
    "a window in tiles cut at documents": Case(
        Layout("striped", 600, 2), (310, 7, 283), window=290
    ),
    "a window after a document one token short of a tile": Case(
        Layout("none", 531, 1), (127, 404), window=400
    ),
    "tiles of stripes": Case(Layout("striped", 640, 2, stripe_size=16), (310, 7, 283), window=290),
}


@each_kernel
@each_traveller
@pytest.mark.parametrize("name", DIFFICULT_CASES)
def test_difficult_cases_are_exact(name, travels, kernel):
    case = replace(DIFFICULT_CASES[name], groups=GROUPS[travels][-1], kernel=kernel)
    assert case.travels == travels
    assert mistakes(case) == {}


# For eight ranks of eight tokens each: window and documents, by how many ranks a query looks back.
SHORT = [(1, ()), (9, ()), (10, ()), (0, (1,)), (0, (9, 2)), (10, (20, 3)), (0, (50, 64))]


@each_kernel
@each_traveller
@pytest.mark.parametrize(("window", "lengths"), SHORT)
def test_a_contiguous_ring_in_which_few_rows_are_read_is_exact(window, lengths, travels, kernel):
    case = Case(
        Layout("ring", 64, 8), lengths, window, samples=2, groups=GROUPS[travels][0], kernel=kernel
    )
    assert case.travels == travels
    assert mistakes(case) == {}


@each_traveller
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "zero_dout_every", [0, 3, 1], ids=["all have dout", "some have dout", "none has dout"]
)
def test_gradients_of_the_log_sum_exp_are_exact_with_and_without_dout(
    zero_dout_every, dtype, travels
):
    case = Case(
        Layout("striped", 42, 3),
        lengths=(20, 9),
        window=15,
        dtype=dtype,
        groups=GROUPS[travels][0],
        zero_dout_every=zero_dout_every,
    )
    assert case.travels == travels
    assert mistakes(case) == {}
