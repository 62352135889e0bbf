"""Prefetch: a thread prepares the batches of the next optimizer steps during the current one.

Batches and their order are those of the loader. Samples count as consumed when their step is
returned, so a checkpoint does not depend on how far the thread is ahead.
"""

from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from types import TracebackType

from megatron_ring.data.loader import Batch, LaterStageLoader, Loader

_STEPS_AHEAD = 2


class Prefetcher:
    """Prepares the steps of ``loader`` ahead of time; no other code may use the loader meanwhile.

    The thread runs inside the ``with`` block and ends when the block is left.

    >>> with Prefetcher(loader) as ahead:  # doctest: +SKIP
    ...     batches = ahead.next_step()
    """

    def __init__(self, loader: Loader | LaterStageLoader):
        self._loader = loader
        self._consumed_samples = loader.consumed_samples
        self._ready: SimpleQueue[tuple[list[Batch], int] | Exception] = SimpleQueue()
        self._free_slots = Semaphore(_STEPS_AHEAD)
        self._stopping = Event()
        self._thread = Thread(target=self._prepare_steps, name="prefetch", daemon=True)

    @property
    def consumed_samples(self) -> int:
        """Samples of the steps returned so far, over all data ranks, as a checkpoint stores it."""
        return self._consumed_samples

    def next_step(self) -> list[Batch]:
        """Return the loader's next step; blocks until it is ready.

        Raises what the loader raised for this step.
        """
        ready = self._ready.get()
        if isinstance(ready, Exception):
            self._ready.put(ready)  # the thread has ended: later calls raise the same error
            raise ready
        self._free_slots.release()
        batches, self._consumed_samples = ready
        return batches

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        self._stopping.set()
        self._free_slots.release()
        self._thread.join()

    def _prepare_steps(self) -> None:
        while self._free_slots.acquire() and not self._stopping.is_set():
            try:
                step = self._loader.next_step()
            except Exception as error:
                self._ready.put(error)
                return
            self._ready.put((step, self._loader.consumed_samples))
