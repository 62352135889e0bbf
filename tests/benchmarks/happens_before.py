"""Streams and events that keep account of what is ordered on a device, and find what races.

What is queued on a stream is computed at once; of each operation it is noted what it reads and writes, and what is
known then: how many operations of every stream must be done before it. An event carries that knowledge from one stream
to another, and nothing else does (vector clocks, Fidge 1988 and Mattern 1989). Two operations of which neither knows
the other race where they touch the same memory and one of them writes.
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
    """Two operations on the same memory, in no order."""


class Operation(NamedTuple):
    stream: "Stream"
    number: int


class Event(NamedTuple):
    origin: "Stream"
    known: dict["Stream", int]


@dataclass(eq=False)
class Stream:
    """As torch.cuda.Stream. known: how many operations of each stream are done before what is queued here next."""

    ring_rank: int
    kind: str
    forgets: Callable[["Stream", "Stream"], bool]
    known: dict["Stream", int] = field(default_factory=lambda: defaultdict(int))

    def record_event(self) -> Event:
        return Event(self, dict(self.known))

    def wait_event(self, event: Event) -> None:
        if not self.forgets(self, event.origin):
            for stream, number in event.known.items():
                self.known[stream] = max(self.known[stream], number)

    def knows(self, operation: Operation) -> bool:
        return self.known[operation.stream] >= operation.number


@dataclass
class Memory:
    """Of one storage: who wrote last, and who has read since. kept: holds it, so that no other takes its place."""

    kept: torch.UntypedStorage
    written: Operation | None = None
    read: list[Operation] = field(default_factory=list)


class Device:
    """What is noted of all streams. copies: of each in order, the stream and what it knew."""

    def __init__(self):
        self.copies: list[Event] = []
        self._memory: dict[int, Memory] = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    @property
    def current(self) -> Stream:
        """The stream that this thread queues on."""
        return self._here.stream

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        outer = getattr(self._here, "stream", None)
        self._here.stream = stream
        with contextlib.nullcontext() if outer else _Noting(self):
            yield
        self._here.stream = outer

    def note(self, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """An operation on this thread's stream."""
        with self._lock:
            stream = self.current
            operation = Operation(stream, stream.known[stream] + 1)
            for tensor in reads:
                self._reads(operation, tensor)
            for tensor in writes:
                self._writes(operation, tensor)
            stream.known[stream] += 1

    def _reads(self, operation: Operation, tensor: torch.Tensor) -> None:
        memory = self._of(tensor)
        if memory.written and not operation.stream.knows(memory.written):
            raise Race("read before it is there")
        memory.read.append(operation)

    def _writes(self, operation: Operation, tensor: torch.Tensor) -> None:
        memory = self._of(tensor)
        before = [*memory.read, *([memory.written] if memory.written else [])]
        if not all(other == operation or operation.stream.knows(other) for other in before):
            raise Race("overwritten while others are at it")
        memory.written, memory.read = operation, []

    def _of(self, tensor: torch.Tensor) -> Memory:
        storage = tensor.untyped_storage()
        return self._memory.setdefault(storage._cdata, Memory(storage))


class _Noting(TorchDispatchMode):
    """Notes every operation of a thread. Runs of a mask, int64, are the host's, and all ranks may have the same."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        there = {tensor.untyped_storage()._cdata for tensor in given}
        made = [
            tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in there
        ]
        if func is torch.ops.aten.copy_.default and self.device.current.kind == "messages":
            self.device.copies.append(self.device.current.record_event())
        self.device.note(given, [*made, *_written(func, args, kwargs)])
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.int64
    ]


def _written(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Of what is given that which the operator's schema says it writes to."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    into = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    return _tensors([named.get(name) for name in into])
