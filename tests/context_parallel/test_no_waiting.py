"""Nothing in a hop makes the host wait for the device.

The tensors in play are on the meta device: they have shapes and no values, so that whoever asks for a value is told
that there is none. The runs of a mask are on the host by design, which is how they are told apart; what goes from there
to the device must be a copy that nobody waits for. On a GPU benchmarks/trace_overlap.py asks the device itself.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from megatron_ring.context_parallel import invariant
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.kernels.attention import KERNELS, HopKernel, flash
from megatron_ring.kernels.attention.runs import KeyRanges

RANKS, SHARD, HEADS = 4, 64, 4
PACK = Mask(document_starts=(0, 50, 51, 190))
TRAINED_WITH = sorted(KERNELS.keys() - {"reference"})  # the oracle may wait
ASKS_FOR_A_VALUE = "meta tensor|Meta tensors|register_meta function"


class HostWaits(Exception):
    """A copy to the device, and the host waits for it."""


class NoWaiting(TorchDispatchMode):
    """Raises at a copy from the host to the device that is not said to be non-blocking."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            source, waits = args[0], not kwargs.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            source, waits = args[1], not any(args[2:])
        else:
            return result
        if waits and source.device.type == "cpu" and result.device.type != "cpu":
            raise HostWaits(func)
        return result


class Kept(NamedTuple):
    """An exchange, and its transfer, by which every rank gets what it has."""

    tensor: torch.Tensor | None = None

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "Kept":
        return Kept(tensor)

    def wait(self) -> torch.Tensor:
        return self.tensor


def hops(
    kernel: HopKernel, layout: Layout, mask: Mask, groups: int, loop: ModuleType = ring_loop
) -> None:
    """All that one rank does, forward and backward, on tensors without values."""
    q = torch.empty(1, SHARD, HEADS, 64, dtype=torch.bfloat16, device="meta")
    kv, dlse = (
        q.new_empty(2, 1, SHARD, groups, 64),
        q.new_empty(1, HEADS, SHARD, dtype=torch.float32),
    )
    ring = ring_loop.Ring(layout, 1, kernel, 0.125, Kept(), mask)
    mask.runs.clear()  # what was kept of other runs is not copied again
    with NoWaiting():
        out, lse = loop.forward(q, kv, ring)
        loop.backward(q, dlse, q, kv, out, lse, ring)


class FlashAttention:
    """A stand-in for the package, which is for GPUs alone: what it answers, of tokens end to end."""

    @staticmethod
    def forward(q_THD, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1::-1], dtype=torch.float32)

    @staticmethod
    def backward(dout_THD, q_THD, k_UGD, v_UGD, *rest) -> list[torch.Tensor]:
        return [torch.empty_like(x) for x in (q_THD, k_UGD, v_UGD)]


@pytest.fixture(autouse=True)
def _a_gpu_is_made_believe(monkeypatch):
    """Triton's kernels read values, on the device; what is looked at here is what surrounds their launch."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flash, "_library", lambda q: FlashAttention)


each_layout = pytest.mark.parametrize("name", ["ring", "striped", "zigzag"])
each_way = pytest.mark.parametrize("groups", [HEADS, 1], ids=["queries travel", "keys travel"])


@each_way
@each_layout
@pytest.mark.parametrize(
    "mask", [CAUSAL, PACK, Mask(window=70)], ids=["causal", "documents", "window"]
)
@pytest.mark.parametrize("kernel", TRAINED_WITH)
def test_the_host_waits_for_nothing_in_a_hop(kernel, mask, name, groups):
    hops(KERNELS[kernel], Layout(name, RANKS * SHARD, RANKS), mask, groups)


@each_way
@pytest.mark.parametrize("kernel", TRAINED_WITH)
def test_nor_in_the_hops_of_the_invariant_reduction(kernel, groups):
    hops(KERNELS[kernel], Layout("striped", RANKS * SHARD, RANKS), PACK, groups, invariant)


# Whatever makes the host wait on CUDA: a value that is asked for, a shape that depends on values, a plain copy.
WAITING = {
    "item": lambda q: q.sum().item(),
    "a branch": lambda q: bool(q.any()),
    "tolist": lambda q: q[0, 0, 0, :1].tolist(),
    "to the host": lambda q: q.cpu(),
    "nonzero": lambda q: q.nonzero(),
    "a mask as an index": lambda q: q[q > 0],
    "masked_select": lambda q: q.masked_select(q > 0),
    "unique": lambda q: q.unique(),
    "equal": lambda q: torch.equal(q, q),
}


class Waiting(NamedTuple):
    """A kernel that computes nothing, and in one direction does with its first tensor what makes the host wait."""

    direction: str
    waits: Callable[[torch.Tensor], object]

    def forward(self, q_BLHD, *rest) -> None:
        if self.direction == "forward":
            self.waits(q_BLHD)

    def backward(self, dout_BLHD, *rest) -> None:
        if self.direction == "backward":
            self.waits(dout_BLHD)


each_direction = pytest.mark.parametrize("direction", ["forward", "backward"])


@each_direction
@pytest.mark.parametrize("waits", WAITING.values(), ids=WAITING)
def test_what_asks_for_a_value_is_found(waits, direction):
    with pytest.raises((RuntimeError, NotImplementedError), match=ASKS_FOR_A_VALUE):
        hops(Waiting(direction, waits), Layout("ring", RANKS * SHARD, RANKS), CAUSAL, 1)


PLAIN_COPIES = {
    "to": lambda q: torch.ones(3).to(q.device),
    "to, and another type": lambda q: torch.ones(3).to(q.device, torch.int32),
    "copy_": lambda q: q[0, 0, 0].copy_(torch.ones(64)),
}


@each_direction
@pytest.mark.parametrize("copies", PLAIN_COPIES.values(), ids=PLAIN_COPIES)
def test_a_plain_copy_to_the_device_is_found(copies, direction):
    with pytest.raises(HostWaits):
        hops(Waiting(direction, copies), Layout("ring", RANKS * SHARD, RANKS), CAUSAL, 1)


def test_copies_to_cuda_are_from_pinned_memory(monkeypatch):
    """Without it CUDA's copy is not asynchronous, whatever is said."""
    copied = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.as_subclass(Pinned))
    monkeypatch.setattr(
        Pinned, "to", lambda x, device, non_blocking: copied.append((device.type, non_blocking))
    )
    runs = KeyRanges(torch.zeros(8, dtype=torch.int64), torch.arange(1, 9))
    runs.bounds(torch.device("cuda"))
    runs.query_ranges(8, torch.device("cuda"))
    assert copied == [("cuda", True)] * 2


class Pinned(torch.Tensor):
    """A stand-in for a tensor in pinned memory, of which there is none without a GPU."""
