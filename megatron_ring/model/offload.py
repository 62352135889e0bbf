"""Activations in CPU memory between a layer's forward and its backward (--offload-activations), fetched ahead of use.

What autograd saves in a layer goes out as it is saved, and comes back while the layer after it is differentiated, as
in vDNN (Rhu et al. 2016, section 3). With --recompute full that is a layer's input and its attention's output. On CUDA
copies run in a stream of their own, to and from pinned memory, and the computation waits for none that it does not
need yet. On a CPU the same steps are taken and nothing is gained.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# In bytes: less is not worth a copy.
SMALLEST = 1 << 16


class Offload:
    """One forward pass through some layers, and its backward: ``with offload.layer(): x = run_block(...)`` for each.

    Parameters and views of them stay where they are; so do tensors on other devices than ``device``, and storages of
    fewer than ``smallest`` bytes.
    """

    def __init__(self, device: torch.device, smallest: int = SMALLEST):
        self.device = device
        self.smallest = smallest
        self.last: _Layer | None = None
        self.reached: _Layer | None = None

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """The next layer's forward: what autograd saves in it goes to CPU memory."""
        self.last = layer = _Layer(self.device, self.last)
        with torch.autograd.graph.saved_tensors_hooks(
            functools.partial(self._pack, layer), self._unpack
        ):
            yield
        layer.forward_is_over()

    def _pack(self, layer: "_Layer", tensor: torch.Tensor) -> "torch.Tensor | _Moved":
        if not self._moves(tensor):
            # A result that held itself would never be freed. Parameters are held as they are: ZeRO 3 puts them together
            # in other memory before backward.
            return tensor if tensor.is_leaf else tensor.detach()
        place = layer.send(tensor.untyped_storage())
        return _Moved(
            layer, place, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
        )

    def _moves(self, tensor: torch.Tensor) -> bool:
        owner = tensor if tensor._base is None else tensor._base
        large = tensor.untyped_storage().nbytes() >= self.smallest
        return (
            large and tensor.device.type == self.device.type and not isinstance(owner, nn.Parameter)
        )

    def _unpack(self, packed: "torch.Tensor | _Moved") -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._reach(packed.layer)
        storage = packed.layer.storage(packed.place)
        empty = torch.empty(0, dtype=packed.dtype, device=self.device)
        return empty.set_(storage, packed.offset, packed.size, packed.stride)

    def _reach(self, layer: "_Layer") -> None:
        """Backward has come to ``layer``: the one that it has left goes, the one that it comes to next is fetched."""
        if layer is self.reached:
            return
        if self.reached:
            self.reached.drop()
        self.reached = layer
        layer.fetch()
        if layer.before:
            layer.before.fetch()


@dataclass(frozen=True)
class _Moved:
    """A tensor in a storage that is elsewhere."""

    layer: "_Layer"
    place: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Layer:
    """What one layer saved. Storages are moved, not tensors: a view keeps all of its storage alive, and several one.

    copies: their bytes in CPU memory. fetched: on the device again, each with what tells that it has arrived.
    """

    def __init__(self, device: torch.device, before: "_Layer | None"):
        self.device = device
        self.before = before
        self.sent: list[torch.UntypedStorage] = []
        self.copies: list[torch.Tensor] = []
        self.fetched: list[tuple[torch.Tensor, torch.cuda.Event | None]] | None = None

    def send(self, storage: torch.UntypedStorage) -> int:
        """Copy a storage to CPU memory unless that is done; its number among the layer's."""
        addresses = [sent.data_ptr() for sent in self.sent]
        if storage.data_ptr() in addresses:
            return addresses.index(storage.data_ptr())
        self.sent.append(storage)  # held, so that no other storage of the layer can get its address
        there = torch.empty(
            storage.nbytes(), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        _copy(
            there, torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage), self.device
        )
        self.copies.append(there)
        return len(self.copies) - 1

    def forward_is_over(self) -> None:
        self.sent.clear()

    def fetch(self) -> None:
        """Begin to bring everything back, unless that is done."""
        if self.fetched is None:
            here = [torch.empty_like(there, device=self.device) for there in self.copies]
            self.fetched = [
                (x, _copy(x, there, self.device)) for x, there in zip(here, self.copies)
            ]

    def storage(self, place: int) -> torch.UntypedStorage:
        """A storage that was fetched. On CUDA the current stream waits for it, not the host."""
        x, arrival = self.fetched[place]
        if arrival:
            arrival.wait()
        return x.untyped_storage()

    def drop(self) -> None:
        self.fetched = None


def _copy(to: torch.Tensor, of: torch.Tensor, device: torch.device) -> torch.cuda.Event | None:
    """``to`` becomes ``of``; one of them is on ``device``. On CUDA that only begins, and the event tells the end."""
    if device.type != "cuda":
        to.copy_(of)
        return None
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        to.copy_(of, non_blocking=True)
    # Whoever frees it while it is copied must not have its memory used for something else.
    (to if to.is_cuda else of).record_stream(stream)
    return stream.record_event()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole run, so that copies come one after another: none comes back before it has gone."""
    return torch.cuda.Stream(device)
