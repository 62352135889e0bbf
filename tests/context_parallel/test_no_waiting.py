"""A hop never makes the host wait for the device.

The ring's tensors are on the meta device: they have shapes and no values, so that code that reads a
value raises an error. The key ranges of a mask are on the host by design, and must reach the device
by non-blocking copies. On a GPU benchmarks/trace_overlap.py checks the same in a trace.
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
from megatron_ring.kernels.attention import KERNELS, HopInputs, HopKernel, flash
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.parallel.peers import Peers

RANKS, SHARD, HEADS = 4, 64, 4
PACKED = Mask(document_starts=(0, 50, 51, 190))
TRAINING_KERNELS = sorted(KERNELS.keys() - {"reference"})  # the reference may wait
READS_A_VALUE = "meta tensor|Meta tensors|register_meta function"


class HostWaits(Exception):
    """The host waits for a copy to the device."""


class ForbidBlockingCopies(TorchDispatchMode):
    """Raises HostWaits at a copy from the host to the device that is not non-blocking."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            source = args[0]
            blocks = not kwargs.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            source = args[1]
            blocks = not any(args[2:])
        else:
            return result
        if blocks and source.device.type == "cpu" and result.device.type != "cpu":
            raise HostWaits(func)
        return result


class Loopback(NamedTuple):
    """An exchange, and its transfer, that returns its own tensor, or one of the form asked for."""

    tensor: torch.Tensor | None = None

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "Loopback":
        return Loopback(tensor)

    def start_with(self, peers: Peers, tensor: torch.Tensor, received: torch.Tensor) -> "Loopback":
        return Loopback(received)

    def wait(self) -> torch.Tensor:
        return self.tensor


def run_hops(
    kernel: HopKernel, layout: Layout, mask: Mask, groups: int, loop: ModuleType = ring_loop
) -> None:
    """Run one rank's hops, forward and backward, on tensors without values."""
    q = torch.empty(1, SHARD, HEADS, 64, dtype=torch.bfloat16, device="meta")
    kv = q.new_empty(2, 1, SHARD, groups, 64)
    dlse = q.new_empty(1, HEADS, SHARD, dtype=torch.float32)
    ring = ring_loop.Ring(layout, 1, kernel, 0.125, Loopback(), mask)
    mask.cached_key_ranges.clear()  # cached ranges would not be copied again
    mask.cached_visible_rows.clear()
    with ForbidBlockingCopies():
        out, lse = loop.forward(q, kv, ring)
        loop.backward(q, dlse, q, kv, out, lse, ring)


class FlashAttention:
    """A stand-in for the flash-attn package, which needs a GPU: results of the right shapes."""

    @staticmethod
    def forward(q_THD, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1::-1], dtype=torch.float32)

    @staticmethod
    def backward(dout_THD, q_THD, k_UGD, v_UGD, *rest) -> list[torch.Tensor]:
        return [torch.empty_like(x) for x in (q_THD, k_UGD, v_UGD)]


@pytest.fixture(autouse=True)
def _pretend_to_have_a_gpu(monkeypatch):
    """Triton's kernels are not run: they would read values, and only their launch matters here."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flash, "_library", lambda q: FlashAttention)


each_layout = pytest.mark.parametrize("name", ["ring", "striped", "zigzag"])
each_traveller = pytest.mark.parametrize(
    "groups", [HEADS, 1], ids=["queries travel", "keys travel"]
)


@each_traveller
@each_layout
@pytest.mark.parametrize(
    "mask", [CAUSAL, PACKED, Mask(window=70)], ids=["causal", "documents", "window"]
)
@pytest.mark.parametrize("kernel", TRAINING_KERNELS)
def test_the_host_does_not_wait_in_a_hop(kernel, mask, name, groups):
    run_hops(KERNELS[kernel], Layout(name, RANKS * SHARD, RANKS), mask, groups)


@each_traveller
@pytest.mark.parametrize("kernel", TRAINING_KERNELS)
def test_the_host_does_not_wait_in_a_hop_of_the_invariant_reduction(kernel, groups):
    run_hops(KERNELS[kernel], Layout("striped", RANKS * SHARD, RANKS), PACKED, groups, invariant)


# Operations that read a value or whose shape depends on values, so that the host waits on CUDA.
READING = {
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


class WaitingKernel(NamedTuple):
    """A kernel that only applies ``wait`` to the queries, or in backward to dout."""

    direction: str
    wait: Callable[[torch.Tensor], object]

    def forward(self, inputs: HopInputs, *rest) -> None:
        if self.direction == "forward":
            self.wait(inputs.q_BLHD)

    def backward(self, inputs: HopInputs, dout_BLHD, *rest) -> None:
        if self.direction == "backward":
            self.wait(dout_BLHD)


each_direction = pytest.mark.parametrize("direction", ["forward", "backward"])


@each_direction
@pytest.mark.parametrize("read", READING.values(), ids=READING)
def test_reading_a_value_is_detected(read, direction):
    kernel = WaitingKernel(direction, read)
    with pytest.raises((RuntimeError, NotImplementedError), match=READS_A_VALUE):
        run_hops(kernel, Layout("ring", RANKS * SHARD, RANKS), CAUSAL, 1)


BLOCKING_COPIES = {
    "to": lambda q: torch.ones(3).to(q.device),
    "to, and another type": lambda q: torch.ones(3).to(q.device, torch.int32),
    "copy_": lambda q: q[0, 0, 0].copy_(torch.ones(64)),
}


@each_direction
@pytest.mark.parametrize("copy", BLOCKING_COPIES.values(), ids=BLOCKING_COPIES)
def test_a_blocking_copy_to_the_device_is_detected(copy, direction):
    kernel = WaitingKernel(direction, copy)
    with pytest.raises(HostWaits):
        run_hops(kernel, Layout("ring", RANKS * SHARD, RANKS), CAUSAL, 1)


def test_copies_to_cuda_are_from_pinned_memory(monkeypatch):
    """From pageable memory CUDA's copy would block in spite of non_blocking."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.as_subclass(PinnedTensor))
    monkeypatch.setattr(
        PinnedTensor,
        "to",
        lambda x, device, non_blocking: copies.append((device.type, non_blocking)),
    )
    key_ranges = KeyRanges(torch.zeros(8, dtype=torch.int64), torch.arange(1, 9))
    key_ranges.bounds(torch.device("cuda"))
    key_ranges.query_ranges(8, torch.device("cuda"))
    assert copies == [("cuda", True)] * 2


class PinnedTensor(torch.Tensor):
    """A stand-in for a tensor in pinned memory, which requires a GPU."""
