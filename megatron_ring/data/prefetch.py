"""Prefetch: a thread prepares the batches of the next optimizer steps while the step before them computes.

The batches and their order are the loader's. What counts as consumed is what was handed out, so that a checkpoint
knows nothing of what lies ready.
"""

from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from types import TracebackType

from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.stages import LaterStageLoader

_STEPS_AHEAD = 2


class Prefetcher:
    """A ``loader``'s steps, ready before they are asked for. Leaving it ends its thread; the loader is its alone.

    >>> with Prefetcher(loader) as ahead:  # doctest: +SKIP
    ...     batches = ahead.next_step()
    """

    def __init__(self, loader: Loader | LaterStageLoader):
        self._loader, self._consumed_samples = loader, loader.consumed_samples
        self._ready: SimpleQueue[tuple[list[Batch], int] | Exception] = SimpleQueue()
        self._places, self._leaving = Semaphore(_STEPS_AHEAD), Event()
        self._thread = Thread(target=self._prepare, name="prefetch", daemon=True)

    @property
    def consumed_samples(self) -> int:
        """Samples of the steps handed out, over all data ranks: what a checkpoint keeps."""
        return self._consumed_samples

    def next_step(self) -> list[Batch]:
        """The loader's next step; blocks until it is ready. Raises what the loader raised, in its place."""
        ready = self._ready.get()
        if isinstance(ready, Exception):
            self._ready.put(ready)  # nothing follows it: whoever asks again is told again
            raise ready
        self._places.release()
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
        self._leaving.set()
        self._places.release()
        self._thread.join()

    def _prepare(self) -> None:
        while self._places.acquire() and not self._leaving.is_set():
            try:
                self._ready.put((self._loader.next_step(), self._loader.consumed_samples))
            except Exception as error:
                return self._ready.put(error)
