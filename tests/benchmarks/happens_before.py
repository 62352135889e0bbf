"""Recording streams and events that find races: unordered accesses to the same memory.

Work queued on a stream is computed at once. For each operation it is recorded which tensors it
reads and writes, and how many operations of every stream are known to be complete before it. Only
an event carries that knowledge from one stream to another (vector clocks, Fidge 1988 and Mattern
1989). Two operations race if neither is known to be complete before the other, they touch the same
memory and at least one of them writes.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Race(Exception):
    """Two operations access the same memory in no defined order."""


class Operation(NamedTuple):
    stream: "Stream"
    number: int


class Event(NamedTuple):
    origin: "Stream"
    completed: dict["Stream", int]


@dataclass(eq=False)
class Stream:
    """A stand-in for torch.cuda.Stream.

    Attributes:
        skips_wait: Predicate of the waiting stream and an event's origin; such waits are left out.
        completed: By stream, the number of operations that are complete before the next one here.
    """

    ring_rank: int
    kind: str
    skips_wait: Callable[["Stream", "Stream"], bool]
    completed: dict["Stream", int] = field(default_factory=lambda: defaultdict(int))

    def record_event(self) -> Event:
        return Event(self, dict(self.completed))

    def wait_event(self, event: Event) -> None:
        if self.skips_wait(self, event.origin):
            return
        for stream, number in event.completed.items():
            self.completed[stream] = max(self.completed[stream], number)

    def is_after(self, operation: Operation) -> bool:
        """Return whether ``operation`` is complete before the next operation on this stream."""
        return self.completed[operation.stream] >= operation.number


@dataclass
class Accesses:
    """The last write to a storage and the reads since.

    Attributes:
        storage: Kept alive, so that no other storage gets its address.
    """

    storage: torch.UntypedStorage
    written: Operation | None = None
    read: list[Operation] = field(default_factory=list)


class Device:
    """Records the operations of all streams.

    Attributes:
        copies: An event for each message copied, in order.
    """

    def __init__(self):
        self.copies: list[Event] = []
        self._accesses: dict[int, Accesses] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def current(self) -> Stream:
        """The stream on which this thread queues its work."""
        return self._local.stream

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        outer = getattr(self._local, "stream", None)
        self._local.stream = stream
        with contextlib.nullcontext() if outer else _Recording(self):
            yield
        self._local.stream = outer

    def record(self, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """Record an operation on this thread's stream; raise Race if it races."""
        with self._lock:
            stream = self.current
            operation = Operation(stream, stream.completed[stream] + 1)
            for tensor in reads:
                self._record_read(operation, tensor)
            for tensor in writes:
                self._record_write(operation, tensor)
            stream.completed[stream] += 1

    def _record_read(self, operation: Operation, tensor: torch.Tensor) -> None:
        accesses = self._accesses_of(tensor)
        if accesses.written and not operation.stream.is_after(accesses.written):
            raise Race("read before the write is complete")
        accesses.read.append(operation)

    def _record_write(self, operation: Operation, tensor: torch.Tensor) -> None:
        accesses = self._accesses_of(tensor)
        earlier = list(accesses.read)
        if accesses.written:
            earlier.append(accesses.written)
        for other in earlier:
            if other != operation and not operation.stream.is_after(other):
                raise Race("overwritten while still in use")
        accesses.written = operation
        accesses.read = []

    def _accesses_of(self, tensor: torch.Tensor) -> Accesses:
        storage = tensor.untyped_storage()
        return self._accesses.setdefault(storage._cdata, Accesses(storage))


class _Recording(TorchDispatchMode):
    """Records every operation of a thread.

    Key ranges of a mask, int64, are left out: they are on the host, and all ranks may share them.
    """

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [
            tensor
            for tensor in _tensors(result)
            if tensor.untyped_storage()._cdata not in input_storages
        ]
        if func is torch.ops.aten.copy_.default and self.device.current.kind == "messages":
            self.device.copies.append(self.device.current.record_event())
        self.device.record(inputs, [*new, *_mutated(func, args, kwargs)])
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.int64
    ]


def _mutated(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the arguments that the operator mutates according to its schema."""
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args)) | kwargs
    mutated = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    return _tensors([values.get(name) for name in mutated])
