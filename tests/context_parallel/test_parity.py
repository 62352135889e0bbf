"""Exact attention for any documents, any window and any layout, with keys or queries on their way back.

Rings of one to eight ranks against the oracle, forward and backward: cases that once needed thought, by name, and many
more that hypothesis draws.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.traffic import queries_are_lighter
from megatron_ring.kernels.attention import KERNELS
from tests import oracle, simulated_ring
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance

TOKENS, HEADS = 130, 4
HEAD_SIZE = 8
# Equal heads are fewer bytes as queries, grouped heads as keys.
GROUPS = {"queries": [4], "keys": [1, 2]}


@dataclass(frozen=True)
class Case:
    """lengths: of the documents, over and over through the samples laid end to end; () is no packing.

    unread: each so-many-th token's output has no gradient; 0 is none. lse_read: the log-sum-exp has one.
    """

    layout: Layout
    lengths: tuple[int, ...] = ()
    window: int = 0
    samples: int = 1
    groups: int = 4
    dtype: torch.dtype = torch.float64
    kernel: str = "sdpa"
    unread: int = 0
    lse_read: bool = True

    @property
    def document_BS(self) -> torch.Tensor:
        return oracle.documents(
            self.samples, self.layout.seq_length, self.lengths or (self.layout.seq_length,)
        )

    @property
    def mask(self) -> Mask:
        if not self.lengths:
            return Mask(self.window)
        return Mask(
            self.window, tuple(oracle.document_starts(self.document_BS).tolist()), self.samples
        )

    def inputs(self) -> tuple[torch.Tensor, ...]:
        q, k, v, dout = oracle.random_inputs(
            self.samples, self.layout.seq_length, HEADS, self.groups, self.dtype, HEAD_SIZE
        )
        if self.unread:
            dout[:, :: self.unread] = 0
        return q, k, v, dout

    @property
    def travels(self) -> str:
        q, k, v, _ = self.inputs()
        return "queries" if queries_are_lighter(q, torch.stack([k, v])) else "keys"


def mistakes(case: Case) -> dict[str, float]:
    inputs = case.inputs()
    dlse = oracle.random_dlse(inputs[0]) if case.lse_read else None
    found = simulated_ring.run(
        case.layout, KERNELS[case.kernel], *inputs, mask=case.mask, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(case.document_BS, case.window), dlse)
    return beyond_tolerance(found, expected, case.dtype)


@st.composite
def layouts(draw, name: str) -> Layout:
    ring_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    stripe = draw(st.sampled_from([1, 2, 3, 5, 16])) if name == "striped" else 1
    unit = ring_size * stripe * (2 if name == "zigzag" else 1)
    return Layout(name, unit * draw(st.integers(1, TOKENS // unit)), ring_size, stripe)


def documents_in(layout: Layout) -> st.SearchStrategy[tuple[int, ...]]:
    """Single tokens, fewer than there are ranks, primes, shards, whole samples, and any."""
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
def cases(draw, name: str, narrowed: str, travels: str) -> Case:
    layout = draw(layouts(name))
    return Case(
        layout,
        lengths=draw(documents_in(layout)) if "documents" in narrowed else (),
        window=draw(windows_in(layout)) if "window" in narrowed else 0,
        samples=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from(GROUPS[travels])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        kernel=draw(st.sampled_from(list(FAST_KERNELS))),
        unread=draw(st.sampled_from([0, 3, 1])),
        lse_read=draw(st.booleans()),
    )


each_way = pytest.mark.parametrize("travels", GROUPS)
each_kernel = pytest.mark.parametrize("kernel", FAST_KERNELS)


@each_way
@pytest.mark.parametrize("narrowed", ["whole", "documents", "window", "window in documents"])
@pytest.mark.parametrize("name", ["ring", "striped", "zigzag"])
@settings(max_examples=24)
@given(data=st.data())
def test_any_documents_window_and_layout(name, narrowed, travels, data):
    case = data.draw(cases(name, narrowed, travels))
    assert case.travels == travels
    assert mistakes(case) == {}


NAMED = {
    "documents shorter than the ring, so that ranks hold none of them": Case(
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
    "a window behind a document one short of a tile": Case(
        Layout("none", 531, 1), (127, 404), window=400
    ),
    "tiles of stripes": Case(Layout("striped", 640, 2, stripe_size=16), (310, 7, 283), window=290),
}


@each_kernel
@each_way
@pytest.mark.parametrize("name", NAMED)
def test_what_once_needed_thought(name, travels, kernel):
    case = replace(NAMED[name], groups=GROUPS[travels][-1], kernel=kernel)
    assert case.travels == travels
    assert mistakes(case) == {}


# of eight ranks with eight tokens each: window, documents and hops
CUTS = [
    (1, (), 1),
    (9, (), 2),
    (10, (), 3),
    (0, (1,), 1),
    (0, (9, 2), 2),
    (10, (20, 3), 3),
    (0, (50, 64), 8),
]


@each_kernel
@each_way
@pytest.mark.parametrize(("window", "lengths", "hops"), CUTS)
def test_a_ring_that_is_cut_is_as_exact(window, lengths, hops, travels, kernel):
    case = Case(
        Layout("ring", 64, 8), lengths, window, samples=2, groups=GROUPS[travels][0], kernel=kernel
    )
    assert case.travels == travels
    assert case.layout.hops(case.mask.reach(case.layout.seq_length)) == hops
    assert mistakes(case) == {}


@each_way
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("unread", [0, 3, 1], ids=["everywhere", "not everywhere", "nowhere"])
def test_the_log_sum_exp_has_a_gradient_whether_or_not_the_output_has(unread, dtype, travels):
    case = Case(
        Layout("striped", 42, 3), (20, 9), 15, dtype=dtype, groups=GROUPS[travels][0], unread=unread
    )
    assert case.travels == travels
    assert mistakes(case) == {}
