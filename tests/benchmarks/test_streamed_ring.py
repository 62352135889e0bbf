"""The ring of streams on one device: its events order what ranks do to each other's memory, and nothing too much."""

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
from megatron_ring.context_parallel.ring import Transfer
from megatron_ring.kernels.attention import HopKernel, reference
from tests.benchmarks.happens_before import Device, Race, Stream

TOKENS, HEADS, SIZE = 8, 2, 4


@dataclass
class Reusing:
    """An exchange whose rank makes use of all it is promised: it writes to what it sent once that is over."""

    exchange: StreamExchange
    device: Device

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "ReusingTransfer":
        return ReusingTransfer(self.exchange.start(tensor, distance), tensor, self.device)


@dataclass
class ReusingTransfer:
    transfer: Transfer
    sent: torch.Tensor
    device: Device

    def wait(self) -> torch.Tensor:
        received = self.transfer.wait()
        self.device.note(reads=[], writes=[self.sent])
        return received


def run(
    ranks: int,
    groups: int,
    device: Device | None = None,
    loop: ModuleType = ring_loop,
    kernel: HopKernel = reference,
    forgets: Callable[[Stream, Stream], bool] = lambda waiting, origin: False,
) -> list[tuple[torch.Tensor, ...]]:
    """Forward and backward of every rank, on streams of ``device``, or on none; what each rank found."""

    def streams(rank: int) -> Streams:
        if device is None:
            return Streams.of_device("cpu")
        return Streams(*(Stream(rank, kind, forgets) for kind in ("hops", "messages")), device.on)

    def body(rank: int, exchange: StreamExchange) -> tuple:
        exchange = Reusing(exchange, device) if device else exchange
        ring = ring_loop.Ring(Layout("striped", ranks * TOKENS, ranks), rank, kernel, 0.5, exchange)
        out, lse = loop.forward(q[rank], kv[rank], ring)
        return out, lse, *loop.backward(q[rank], None, q[rank], kv[rank], out, lse, ring)

    generator = torch.Generator().manual_seed(0)
    q = [torch.randn(1, TOKENS, HEADS, SIZE, generator=generator) for _ in range(ranks)]
    kv = [torch.randn(2, 1, TOKENS, groups, SIZE, generator=generator) for _ in range(ranks)]
    return on_every_rank([streams(rank) for rank in range(ranks)], body)


each_way = pytest.mark.parametrize("groups", [2, 1], ids=["queries travel", "keys travel"])
each_size = pytest.mark.parametrize("ranks", [2, 3, 4])
each_loop = pytest.mark.parametrize(
    ("loop", "ranks"),
    [(ring_loop, 2), (ring_loop, 3), (invariant, 2), (invariant, 4)],
    ids=lambda value: getattr(value, "__name__", value),
)


@each_way
@each_loop
def test_nothing_races_and_nothing_changes(loop, ranks, groups):
    of_streams, without = run(ranks, groups, Device(), loop), run(ranks, groups, loop=loop)
    assert all(torch.equal(x, y) for pair in zip(of_streams, without) for x, y in zip(*pair))


# A wait that is left out: who waits, for what, and whether both are of the same rank.
WAITS = {
    "for what is sent": ("messages", "hops", False),
    "for room to receive": ("messages", "hops", True),
    "for what is received": ("hops", "messages", True),
    "for what was sent to be read": ("hops", "messages", False),
}


@each_way
@each_loop
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_that_is_left_out_is_a_race(wait, loop, ranks, groups):
    def forgets(waiting: Stream, origin: Stream) -> bool:
        return (waiting.kind, origin.kind, waiting.ring_rank == origin.ring_rank) == wait

    with pytest.raises(Race):
        run(ranks, groups, Device(), loop, forgets=forgets)


def test_a_kernel_that_writes_to_keys_under_way_races():
    class Scribbling:
        @staticmethod
        def forward(q_BLHD, k_BLGD, *rest):
            k_BLGD.mul_(1.0)

    with pytest.raises(Race):
        run(2, 1, Device(), kernel=Scribbling)


@each_size
def test_a_message_does_not_wait_for_the_hop_that_it_travels_under(ranks):
    """Nor for any later one; of all that its sender queues, only for what that queued before it posted."""
    device, hops = Device(), defaultdict(list)

    class Noted:
        """The reference, and how many operations its rank had queued when each hop of forward began."""

        backward = staticmethod(reference.backward)

        @staticmethod
        def forward(*arguments):
            hops[device.current.ring_rank].append(device.current.known[device.current])
            reference.forward(*arguments)

    run(ranks, 1, device, kernel=Noted)
    for receiver in range(ranks):
        copies = [known for stream, known in device.copies if stream.ring_rank == receiver][
            : ranks - 1
        ]
        sender = (receiver - 1) % ranks
        queued = [
            number
            for known in copies
            for stream, number in known.items()
            if is_hops_of(stream, sender)
        ]
        assert len(queued) == ranks - 1
        assert all(before <= hop for before, hop in zip(queued, hops[sender]))


def is_hops_of(stream: Stream, ring_rank: int) -> bool:
    return (stream.kind, stream.ring_rank) == ("hops", ring_rank)


def test_a_rank_that_fails_is_heard_of_and_nobody_waits_for_it():
    class OutOfMemory:
        @staticmethod
        def forward(q_BLHD, k_BLGD, v_BLGD, runs, *rest):
            if runs.visible_pairs == 0:
                raise MemoryError

    def body(rank: int, exchange: StreamExchange):
        q = torch.ones(1, 2, 1, 1)
        ring = ring_loop.Ring(Layout("ring", 8, 4), rank, OutOfMemory, 1.0, exchange)
        return ring_loop.forward(q, torch.stack([q, q]), ring)

    with pytest.raises(MemoryError):
        on_every_rank([Streams.of_device("cpu") for _ in range(4)], body)
