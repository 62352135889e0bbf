"""The ring on streams of one device: events order all accesses to shared memory, and no more."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from benchmarks.streamed_ring import StreamExchange, Streams, on_every_rank
from megatron_ring.context_parallel import invariant
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.context_parallel.ring_hop import Transfer
from megatron_ring.kernels.attention import HopInputs, HopKernel, reference
from megatron_ring.parallel.peers import Peers
from tests.benchmarks.happens_before import Device, Race, Stream

TOKENS = 8
HEADS = 2
HEAD_DIM = 4


@dataclass
class ReusingExchange:
    """An exchange whose rank overwrites what it sent as soon as a transfer allows it."""

    exchange: StreamExchange
    device: Device

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "ReusingTransfer":
        return ReusingTransfer(self.exchange.start(tensor, distance), tensor, self.device)

    def start_with(
        self, peers: Peers, tensor: torch.Tensor, received: torch.Tensor
    ) -> "ReusingTransfer":
        transfer = self.exchange.start_with(peers, tensor, received)
        return ReusingTransfer(transfer, tensor, self.device)


@dataclass
class ReusingTransfer:
    transfer: Transfer
    sent: torch.Tensor
    device: Device

    def wait(self) -> torch.Tensor:
        received = self.transfer.wait()
        self.device.record(reads=[], writes=[self.sent])
        return received


def run(
    ranks: int,
    kv_heads: int,
    device: Device | None = None,
    loop: ModuleType = ring_loop,
    kernel: HopKernel = reference,
    skips_wait: Callable[[Stream, Stream], bool] = lambda waiting, origin: False,
    mask: Mask = CAUSAL,
    in_flight: int = 1,
) -> list[tuple[torch.Tensor, ...]]:
    """Run forward and backward on every rank, on streams of ``device`` or without streams.

    Returns out, lse and the gradients of each rank.
    """

    def streams(rank: int) -> Streams:
        if device is None:
            return Streams.of_device("cpu")
        hops = Stream(rank, "hops", skips_wait)
        messages = Stream(rank, "messages", skips_wait)
        return Streams(hops, messages, device.on)

    def body(rank: int, exchange: StreamExchange) -> tuple:
        exchange = ReusingExchange(exchange, device) if device else exchange
        layout = Layout("striped", ranks * TOKENS, ranks)
        ring = ring_loop.Ring(
            layout,
            rank,
            kernel,
            0.5,
            exchange,
            mask,
            exchanges_in_flight=lambda hops: in_flight,
        )
        out, lse = loop.forward(q[rank], kv[rank], ring)
        return out, lse, *loop.backward(q[rank], None, q[rank], kv[rank], out, lse, ring)

    generator = torch.Generator().manual_seed(0)
    q = [torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator) for _ in range(ranks)]
    kv = [torch.randn(2, 1, TOKENS, kv_heads, HEAD_DIM, generator=generator) for _ in range(ranks)]
    return on_every_rank([streams(rank) for rank in range(ranks)], body)


each_direction = pytest.mark.parametrize("kv_heads", [2, 1], ids=["queries travel", "keys travel"])
each_size = pytest.mark.parametrize("ranks", [2, 3, 4])
# Every rank reads some rows of every other, and not all.
DOCUMENTS = Mask(document_starts=(0, 2, 2 * TOKENS - 3))
each_loop = pytest.mark.parametrize(
    ("loop", "ranks", "mask", "in_flight"),
    [
        pytest.param(ring_loop, 2, CAUSAL, 1, id="forwarded-2"),
        pytest.param(ring_loop, 3, CAUSAL, 1, id="forwarded-3"),
        pytest.param(ring_loop, 2, DOCUMENTS, 1, id="direct-2"),
        pytest.param(ring_loop, 4, DOCUMENTS, 1, id="direct-4"),
        pytest.param(ring_loop, 5, DOCUMENTS, 2, id="direct-5, two in flight"),
        pytest.param(invariant, 2, CAUSAL, 1, id="invariant-2"),
        pytest.param(invariant, 4, CAUSAL, 1, id="invariant-4"),
    ],
)


@each_direction
@each_loop
def test_nothing_races_and_results_equal_those_without_streams(
    loop, ranks, mask, in_flight, kv_heads
):
    with_streams = run(ranks, kv_heads, Device(), loop, mask=mask, in_flight=in_flight)
    without = run(ranks, kv_heads, loop=loop, mask=mask, in_flight=in_flight)
    for actual, expected in zip(with_streams, without):
        assert all(torch.equal(x, y) for x, y in zip(actual, expected))


# The waits to leave out: the waiting stream, the event's origin, and whether both have one rank.
WAITS = {
    "for the message to be ready": ("messages", "hops", False),
    "for the receive buffer": ("messages", "hops", True),
    "for the message to arrive": ("hops", "messages", True),
    "for the sent message to be read": ("hops", "messages", False),
}


@each_direction
@each_loop
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_leaving_out_any_wait_is_a_race(wait, loop, ranks, mask, in_flight, kv_heads):
    def skips_wait(waiting: Stream, origin: Stream) -> bool:
        return (waiting.kind, origin.kind, waiting.ring_rank == origin.ring_rank) == wait

    with pytest.raises(Race):
        run(ranks, kv_heads, Device(), loop, skips_wait=skips_wait, mask=mask, in_flight=in_flight)


def test_a_kernel_that_writes_to_keys_in_transit_is_a_race():
    class WritesToKeys:
        @staticmethod
        def forward(inputs: HopInputs, state):
            inputs.k_BLGD.mul_(1.0)

    with pytest.raises(Race):
        run(2, 1, Device(), kernel=WritesToKeys)


@each_size
def test_a_message_does_not_wait_for_the_hop_that_hides_it(ranks):
    """A message waits only for what its sender had queued before it posted the message."""
    device = Device()
    queued_before_hop = defaultdict(list)

    class CountingKernel:
        """The reference; counts the operations that its rank had queued before each forward hop."""

        backward = staticmethod(reference.backward)

        @staticmethod
        def forward(*arguments):
            stream = device.current
            queued_before_hop[stream.ring_rank].append(stream.completed[stream])
            reference.forward(*arguments)

    run(ranks, 1, device, kernel=CountingKernel)
    for receiver in range(ranks):
        sender = (receiver - 1) % ranks
        received = [copy for copy in device.copies if copy.origin.ring_rank == receiver]
        waited_for = []
        for copy in received[: ranks - 1]:
            for stream, number in copy.completed.items():
                if stream.kind == "hops" and stream.ring_rank == sender:
                    waited_for.append(number)
        assert len(waited_for) == ranks - 1
        for number, at_hop in zip(waited_for, queued_before_hop[sender]):
            assert number <= at_hop


def test_a_failing_rank_raises_its_error_and_ends_the_others():
    class OutOfMemory:
        @staticmethod
        def forward(inputs: HopInputs, state):
            if inputs.key_ranges.visible_pairs == 0:
                raise MemoryError

    def body(rank: int, exchange: StreamExchange):
        q = torch.ones(1, 2, 1, 1)
        ring = ring_loop.Ring(Layout("ring", 8, 4), rank, OutOfMemory, 1.0, exchange)
        return ring_loop.forward(q, torch.stack([q, q]), ring)

    with pytest.raises(MemoryError):
        on_every_rank([Streams.of_device("cpu") for _ in range(4)], body)
