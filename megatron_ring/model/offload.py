"""Offloading of activations to CPU memory between forward and backward (--offload-activations).

What autograd saves in a layer is copied out as it is saved, and copied back while the layer after
it is in backward, as in vDNN (Rhu et al. 2016, section 3). With --recompute full that is a layer's
input and its attention's output. On CUDA, copies run in a stream of their own, to and from pinned
memory, and the computation waits only for copies that it needs. On a CPU the same steps run without
any benefit.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

SMALLEST = 1 << 16
"""Smallest storage to offload, in bytes: less is not worth a copy."""


class Offload:
    """One forward pass through layers, each run ``with offload.layer():``, and its backward.

    Not offloaded are parameters and views of them, tensors on other devices than ``device``, and
    storages of fewer than ``smallest`` bytes.
    """

    def __init__(self, device: torch.device, smallest: int = SMALLEST):
        self.device = device
        self.smallest = smallest
        self.last: _Layer | None = None  # the last layer of the forward pass so far
        self.current: _Layer | None = None  # the layer that backward is in

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """Copy what autograd saves inside, in the next layer's forward, to CPU memory."""
        layer = _Layer(self.device, previous=self.last)
        self.last = layer
        pack = functools.partial(self._pack, layer)
        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        layer.end_forward()

    def _pack(self, layer: "_Layer", tensor: torch.Tensor) -> "torch.Tensor | _Offloaded":
        if not self._is_offloaded(tensor):
            # A result that holds itself would never be freed, hence detach. Parameters are held as
            # they are: ZeRO 3 gathers them in other memory before backward.
            return tensor if tensor.is_leaf else tensor.detach()
        return _Offloaded(
            layer,
            layer.copy_out(tensor.untyped_storage()),
            tensor.dtype,
            tensor.size(),
            tensor.stride(),
            tensor.storage_offset(),
        )

    def _is_offloaded(self, tensor: torch.Tensor) -> bool:
        base = tensor if tensor._base is None else tensor._base
        return (
            tensor.untyped_storage().nbytes() >= self.smallest
            and tensor.device.type == self.device.type
            and not isinstance(base, nn.Parameter)
        )

    def _unpack(self, packed: "torch.Tensor | _Offloaded") -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._enter(packed.layer)
        storage = packed.layer.storage(packed.index)
        empty = torch.empty(0, dtype=packed.dtype, device=self.device)
        return empty.set_(storage, packed.offset, packed.size, packed.stride)

    def _enter(self, layer: "_Layer") -> None:
        """Free the layer that backward has left for ``layer``, and prefetch the next one."""
        if layer is self.current:
            return
        if self.current:
            self.current.free()
        self.current = layer
        layer.fetch()
        if layer.previous:
            layer.previous.fetch()


@dataclass(frozen=True)
class _Offloaded:
    """A tensor whose storage is in CPU memory. index: of its storage among those of ``layer``."""

    layer: "_Layer"
    index: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Layer:
    """The storages that one layer saved.

    Not tensors are copied but storages: views share one, and each view keeps all of it alive.

    sources: storages copied out so far in forward. copies: their bytes in CPU memory. fetched:
    their copies on the device, each with the event that ends the transfer.
    """

    def __init__(self, device: torch.device, previous: "_Layer | None"):
        self.device = device
        self.previous = previous
        self.sources: list[torch.UntypedStorage] = []
        self.copies: list[torch.Tensor] = []
        self.fetched: list[tuple[torch.Tensor, torch.cuda.Event | None]] | None = None

    def copy_out(self, storage: torch.UntypedStorage) -> int:
        """Copy a storage to CPU memory unless it is there already, and return its index."""
        addresses = [source.data_ptr() for source in self.sources]
        if storage.data_ptr() in addresses:
            return addresses.index(storage.data_ptr())
        self.sources.append(storage)  # held, so that no other storage of the layer gets its address
        on_cuda = self.device.type == "cuda"
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
        source = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        _copy(copy, source, self.device)
        self.copies.append(copy)
        return len(self.copies) - 1

    def end_forward(self) -> None:
        """Release the storages on the device."""
        self.sources.clear()

    def fetch(self) -> None:
        """Begin to copy all storages back to the device, unless that has begun."""
        if self.fetched is not None:
            return
        self.fetched = []
        targets = [torch.empty_like(copy, device=self.device) for copy in self.copies]
        for target, copy in zip(targets, self.copies):
            self.fetched.append((target, _copy(target, copy, self.device)))

    def storage(self, index: int) -> torch.UntypedStorage:
        """Return a fetched storage. On CUDA the current stream waits for it, not the host."""
        fetched, arrival = self.fetched[index]
        if arrival:
            arrival.wait()
        return fetched.untyped_storage()

    def free(self) -> None:
        """Release the fetched storages."""
        self.fetched = None


def _copy(to: torch.Tensor, of: torch.Tensor, device: torch.device) -> torch.cuda.Event | None:
    """Copy ``of`` into ``to``, one of which is on ``device``.

    On CUDA the copy is only enqueued; the returned event marks its end.
    """
    if device.type != "cuda":
        to.copy_(of)
        return None
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        to.copy_(of, non_blocking=True)
    # If the tensor is freed during the copy, its memory must not be reused before the copy ends.
    on_device = to if to.is_cuda else of
    on_device.record_stream(stream)
    return stream.record_event()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all copies, whose order keeps fetches after the copies out."""
    return torch.cuda.Stream(device)
