"""The ring loop in simulated rings: exact for every layout, with the intended exchanges."""

import threading
from typing import NamedTuple

import pytest
import torch

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.kernels.attention import KERNELS, HopInputs, reference, running_softmax
from megatron_ring.kernels.attention.running_softmax import delta
from megatron_ring.parallel.peers import peers_in_hop
from tests import oracle, simulated_ring
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance

# Layout and stripe size, and shard lengths: one token, odd, and around the kernels' tile of 128.
LENGTHS = {
    ("ring", 1): (1, 2, 7, 33, 129, 130),
    ("striped", 1): (1, 2, 7, 33, 129, 130),
    ("striped", 3): (3, 21, 33, 129),
    ("striped", 16): (16, 112, 144),
    ("zigzag", 1): (2, 14, 34, 130, 258),
}

each_layout = pytest.mark.parametrize(("layout", "stripe"), LENGTHS)
each_kernel = pytest.mark.parametrize("kernel", FAST_KERNELS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def mistakes(
    layout: str, stripe: int, ring_size: int, length: int, kernel: str, inputs: list[torch.Tensor]
) -> dict[str, float]:
    """Return which of output, log-sum-exp and gradients differ from the oracle, and by how much.

    ``length`` is the number of tokens per rank.
    """
    run = simulated_ring.run(
        Layout(layout, ring_size * length, ring_size, stripe), KERNELS[kernel], *inputs
    )
    return beyond_tolerance(run.results, oracle.attention(*inputs), inputs[0].dtype)


@each_dtype
@each_kernel
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
@each_layout
def test_a_ring_computes_attention_over_the_whole_sequence(
    layout, stripe, ring_size, kernel, dtype
):
    inputs = oracle.random_inputs(2, ring_size * 48, heads=4, groups=2, dtype=dtype)
    assert mistakes(layout, stripe, ring_size, 48, kernel, inputs) == {}


@each_kernel
@pytest.mark.parametrize(
    ("layout", "stripe", "length"),
    [(*layout, length) for layout in LENGTHS for length in LENGTHS[layout]],
)
def test_shards_of_any_length_are_exact(layout, stripe, length, kernel):
    inputs = oracle.random_inputs(1, 3 * length, heads=2, groups=1)
    assert mistakes(layout, stripe, 3, length, kernel, inputs) == {}


@each_dtype
@each_kernel
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_grouped_heads_and_batches_are_exact(groups, batch, kernel, dtype):
    inputs = oracle.random_inputs(batch, 2 * 33, heads=4, groups=groups, dtype=dtype)
    assert mistakes("striped", 1, 2, 33, kernel, inputs) == {}


@each_kernel
@pytest.mark.parametrize(
    ("layout", "stripe"), [("ring", 1), ("striped", 1), ("striped", 3), ("zigzag", 1)]
)
def test_a_ring_of_eight_is_exact(layout, stripe, kernel):
    inputs = oracle.random_inputs(1, 8 * 18, heads=2, groups=2, dtype=torch.float32)
    assert mistakes(layout, stripe, 8, 18, kernel, inputs) == {}


# In backward the queries travel with equal heads, and the keys with grouped heads.
each_traveller = pytest.mark.parametrize("groups", [2, 1], ids=["queries", "keys"])


def exchange_counts(layout: Layout, mask: Mask, groups: int) -> tuple[list[int], list[int]]:
    """Return how many exchanges each rank started in forward and in backward."""
    inputs = oracle.random_inputs(mask.samples, layout.seq_length, heads=2, groups=groups)
    exchanges = simulated_ring.run(layout, reference, *inputs, mask=mask).exchanges
    return [len(sent) for sent in exchanges.forward], [len(sent) for sent in exchanges.backward]


@each_traveller
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 8])
def test_tensors_travel_once_around_and_accumulators_return_to_their_owner(ring_size, groups):
    """R - 1 exchanges forward; R - 1 backward, and as many of gradient accumulators."""
    around = ring_size - 1
    layout = Layout("zigzag", 2 * ring_size, ring_size)
    expected = [around] * ring_size, [2 * around] * ring_size
    assert exchange_counts(layout, CAUSAL, groups) == expected


# Window and documents, and which of four ranks of six tokens each read rows of which others.
READERS_IN_CONTIGUOUS_SHARDS = [
    (Mask(1), {}),
    (Mask(2), {0: [1], 1: [2], 2: [3]}),
    (Mask(7), {0: [1], 1: [2], 2: [3]}),
    (Mask(8), {0: [1, 2], 1: [2, 3], 2: [3]}),
    (Mask(13), {0: [1, 2], 1: [2, 3], 2: [3]}),
    (Mask(14), {0: [1, 2, 3], 1: [2, 3], 2: [3]}),
    (Mask(0, tuple(range(24))), {}),
    (Mask(0, (0, 7, 14, 21)), {0: [1], 1: [2], 2: [3]}),
    (Mask(0, (0, 8, 16)), {0: [1], 1: [2], 2: [3]}),
    (Mask(0, (0, 1, 2)), {0: [1, 2, 3], 1: [2, 3], 2: [3]}),
    (Mask(7, (0, 1, 2)), {0: [1], 1: [2], 2: [3]}),
    (Mask(0, (0, 7, 14, 21, 24, 31, 38, 45), samples=2), {0: [1], 1: [2], 2: [3]}),
]


@each_traveller
@pytest.mark.parametrize(("mask", "readers"), READERS_IN_CONTIGUOUS_SHARDS, ids=str)
def test_with_windows_and_documents_a_rank_sends_only_to_readers(mask, readers, groups):
    """Once forward; backward a rank sends rows to some ranks and gradients to the others."""
    layout = Layout("ring", 24, 4)
    inputs = oracle.random_inputs(mask.samples, 24, heads=2, groups=groups)
    sent = simulated_ring.run(layout, reference, *inputs, mask=mask).exchanges
    reads = {(owner, reader) for owner, those in readers.items() for reader in those}
    to_reader = [
        [(rank, peers_in_hop(rank, 4, hop).receiver) in reads for hop in range(1, 4)]
        for rank in range(4)
    ]
    assert [[size > 0 for size in sizes] for sizes in sent.forward] == to_reader
    assert sum(size > 0 for sizes in sent.backward for size in sizes) == 2 * len(reads)


@each_traveller
@pytest.mark.parametrize(
    "mask", [Mask(2), Mask(0, tuple(range(24)))], ids=["a window", "documents"]
)
@pytest.mark.parametrize(
    ("name", "stripe"), [("ring", 1), ("striped", 1), ("striped", 3), ("zigzag", 1)]
)
def test_all_layouts_have_a_hop_for_every_rank(name, stripe, mask, groups):
    """Exchanges without rows, which are not posted, are counted."""
    assert exchange_counts(Layout(name, 24, 4, stripe), mask, groups) == ([3] * 4, [6] * 4)


@each_dtype
@each_kernel
@each_layout
def test_a_ring_is_bitwise_reproducible(layout, stripe, kernel, dtype):
    inputs = oracle.random_inputs(1, 3 * 48, heads=4, groups=2, dtype=dtype)
    first, again = (
        simulated_ring.run(Layout(layout, 3 * 48, 3, stripe), KERNELS[kernel], *inputs)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first.results, again.results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_the_error_does_not_grow_with_the_ring(kernel, dtype):
    """Accumulators stay in float32 between hops: eight merges round the output no more than one."""
    inputs = oracle.random_inputs(1, 8 * 24, heads=4, groups=4, dtype=dtype)
    expected = oracle.attention(*inputs).out

    def typical_error(ring_size: int) -> float:
        layout = Layout("striped", 8 * 24, ring_size)
        out = simulated_ring.run(layout, KERNELS[kernel], *inputs).results.out
        return (out.double() - expected).square().mean().sqrt().item()

    assert typical_error(8) < 1.5 * typical_error(1)


def error_of_dq(kernel: str, ring_size: int, travels: str, inputs, dlse=None) -> float:
    """Return the norm of the error relative to the norm of dq."""
    layout = Layout("striped" if ring_size > 1 else "none", inputs[0].shape[1], ring_size)
    settings = {"dlse_BHS": dlse, "sends_queries": lambda q, kv: travels == "queries"}
    dq = simulated_ring.run(layout, KERNELS[kernel], *inputs, **settings).results.dq
    expected = oracle.attention(*inputs, dlse_BHS=dlse).dq
    return float((dq.double() - expected).norm() / expected.norm())


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["output", "output and lse"])
@pytest.mark.parametrize("travels", ["queries", "keys"])
def test_errors_of_delta_do_not_accumulate_for_positive_inputs(travels, with_dlse, dtype, kernel):
    """With equal gradients and positive inputs an error of delta has the same sign for all keys.

    So it does not cancel out. The bound is the error of one process that computes in float32 from
    an output that is rounded once.
    """
    inputs = oracle.random_inputs(1, 192, heads=2, groups=2, head_size=64)
    inputs = [*(x.abs().to(dtype) for x in inputs[:3]), torch.ones_like(inputs[3], dtype=dtype)]
    dlse = 0.1 * oracle.random_dlse(inputs[0]) if with_dlse else None
    on_one_process = error_of_dq("reference", 1, travels, inputs)
    for ring_size in (1, 4):
        assert error_of_dq(kernel, ring_size, travels, inputs, dlse) <= 2.5 * on_one_process


@pytest.mark.parametrize("groups", [1, 4], ids=["keys travel", "queries travel"])
def test_a_rank_computes_delta_once_for_all_hops(groups, monkeypatch):
    computed = []

    def counted(*tensors):
        computed.append(1)
        return delta(*tensors)

    monkeypatch.setattr(running_softmax, "delta", counted)
    inputs = oracle.random_inputs(1, 24, 4, groups)
    simulated_ring.run(Layout("striped", 24, 4), KERNELS["reference"], *inputs)
    assert len(computed) == 4


@each_kernel
def test_the_output_has_the_type_of_the_queries_and_accumulators_are_float32(kernel):
    inputs = oracle.random_inputs(1, 4, heads=2, groups=1, dtype=torch.bfloat16)
    results = simulated_ring.run(Layout("striped", 4, 2), KERNELS[kernel], *inputs).results
    assert results.out.dtype == torch.bfloat16
    assert {results.lse.dtype, results.dq.dtype, results.dk.dtype, results.dv.dtype} == {
        torch.float32
    }


def test_the_error_of_a_rank_is_raised_and_no_rank_waits_for_it():
    class OutOfMemory:
        """Rank 0 fails in the second hop, before it starts its last transfer."""

        def forward(self, inputs: HopInputs, state):
            if inputs.key_ranges.visible_pairs == 0:
                raise MemoryError

    with pytest.raises(MemoryError):
        simulated_ring.run(
            Layout("ring", 8, 4), OutOfMemory(), *oracle.random_inputs(1, 8, heads=1, groups=1)
        )


class EventRecorder:
    """Records calls as an exchange that returns its input and as a kernel that does nothing."""

    def __init__(self):
        self.events: list[str] = []

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "RecordedTransfer":
        number = sum(event.startswith("start") for event in self.events)
        self.events.append(f"start {number}")
        return RecordedTransfer(tensor, f"wait {number}", self.events)

    def backward(self, inputs: HopInputs, dout_BLHD, *rest) -> None:
        self.events.append(f"compute {dout_BLHD.shape[2]} heads")


class RecordedTransfer(NamedTuple):
    tensor: torch.Tensor
    event: str
    events: list[str]

    def wait(self) -> torch.Tensor:
        self.events.append(self.event)
        return self.tensor


HALF = "compute 2 heads"
ALL = "compute 4 heads"


def events_of_backward(layout: Layout, groups: int, splits_own_work: bool) -> list[str]:
    recorder = EventRecorder()
    q = torch.ones(1, 4, 4, 8)
    kv = torch.ones(2, 1, 4, groups, 8)
    lse = torch.zeros(1, 4, 4)
    ring = ring_loop.Ring(layout, 0, recorder, 1.0, recorder, splits_own_work=splits_own_work)
    ring_loop.backward(q, None, q, kv, q, lse, ring)
    return recorder.events


@pytest.mark.parametrize("groups", [4, 2], ids=["queries", "keys"])
def test_backward_computes_while_any_message_travels(groups):
    """Half of the work on own keys overlaps the first message, the other half the last one.

    The accumulators of the first hop are a rank's own and are not sent.
    """
    hops = (
        ["start 0", HALF, "wait 0"],
        ["start 1", ALL, "start 2", "wait 1"],
        [ALL, "wait 2", "start 3"],
    )
    events = events_of_backward(Layout("striped", 12, 3), groups, splits_own_work=True)
    assert events == [*hops[0], *hops[1], *hops[2], HALF, "wait 3"]


@pytest.mark.parametrize("groups", [4, 2], ids=["queries", "keys"])
def test_if_messages_are_fast_all_own_keys_come_first(groups):
    events = events_of_backward(Layout("striped", 8, 2), groups, splits_own_work=False)
    assert events == ["start 0", ALL, "wait 0", ALL, "start 1", "wait 1"]


class _SourceRecordingKernel:
    """The reference kernel, which records the owner of the rows of each call beside the source.

    Rows have their owner's number in every element of k, and those of q 100 more.
    """

    def __init__(self, travels: str):
        self._travels = travels
        self._of_thread = threading.local()
        self.forward_pairs: list[tuple[int, int]] = []
        self.backward_pairs: list[tuple[int, int]] = []

    def on_hop(self, hop: int, hops: int, source: int) -> None:
        self._of_thread.source = source

    def forward(self, inputs: HopInputs, *rest) -> None:
        owner = int(inputs.k_BLGD.flatten()[0])
        self.forward_pairs.append((self._of_thread.source, owner))
        reference.forward(inputs, *rest)

    def backward(self, inputs: HopInputs, *rest) -> None:
        rows = inputs.k_BLGD if self._travels == "keys" else inputs.q_BLHD - 100
        self.backward_pairs.append((self._of_thread.source, int(rows.flatten()[0])))
        reference.backward(inputs, *rest)


@pytest.mark.parametrize("travels", ["keys", "queries"])
@pytest.mark.parametrize("mask", [CAUSAL, Mask(document_starts=(0,))], ids=["around", "directly"])
@pytest.mark.parametrize("ring_size", [2, 3, 4, 6, 8])
def test_monitoring_gets_the_rank_whose_rows_a_hop_processes(ring_size, mask, travels):
    layout = Layout("striped", 2 * ring_size, ring_size)
    owner_S = torch.arange(2 * ring_size) % ring_size
    _, k_BSGD, *rest = oracle.random_inputs(1, 2 * ring_size, heads=1, groups=1)
    k_BSGD = owner_S[None, :, None, None].expand_as(k_BSGD).to(k_BSGD.dtype)
    kernel = _SourceRecordingKernel(travels)
    simulated_ring.run(
        layout,
        kernel,
        k_BSGD + 100,
        k_BSGD,
        *rest,
        mask=mask,
        on_hop=kernel.on_hop,
        sends_queries=lambda q, kv: travels == "queries",
        splits_own_work=False,
    )
    # Among striped tokens every rank's queries see some keys of every rank.
    for pairs in (kernel.forward_pairs, kernel.backward_pairs):
        expected = sorted(rank for rank in range(ring_size) for _ in range(ring_size))
        assert sorted(source for source, _ in pairs) == expected
        assert [source for source, _ in pairs] == [owner for _, owner in pairs]
