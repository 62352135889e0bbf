"""Graceful stops: after a signal, all ranks end after the same step, save, and can be restarted.

SLURM can be set to send SIGUSR1 before a time limit, preemption and launchers send SIGTERM, Ctrl-C
sends SIGINT; a second Ctrl-C exits at once, without a checkpoint. The exit code is EX_TEMPFAIL
(75): start the same command again with --load. srun forwards signals to every rank. torchrun
forwards SIGTERM, waits 30 s, and exits with 1; SIGUSR1 kills it. Each of them kills the
``deepspeed`` command.

A rank whose launcher has ended (parallel/launcher.py) stops in the same way: it would get no more
of the user's signals, and nothing would wait for it. Other nodes may be alive, so the checkpoint is
worth writing.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.launcher import Launchers

EXIT_CODE = os.EX_TEMPFAIL
SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
_EXIT_CODE_OF_INTERRUPT = 128 + signal.SIGINT

# A terminal sends Ctrl-C to ranks and launchers, and torchrun then sends it to the ranks again.
# SIGINTs within this time are one Ctrl-C.
_SECONDS_OF_ONE_INTERRUPT = 2

# All ranks get the signal within a moment of each other. A rank that exited before the others got
# theirs would make them fail.
_SECONDS_UNTIL_ALL_SIGNALLED = 1

_SECONDS_BETWEEN_LAUNCHER_CHECKS = 1.0

# As long as pretrain.sbatch gives the remaining ranks: for the current step and a checkpoint.
_SECONDS_WITHOUT_LAUNCHER = 900.0


class Stopping:
    """Whether this run is to stop, and after which step it did.

    As a context manager it handles signals in a thread, because the main thread may be in a library
    call that waits for ranks that never come. Before ``begin``, a signal ends the process; if only
    one rank gets it then, the launcher has to end the others.
    """

    def __init__(self, is_rank_zero: bool, is_local_rank_zero: bool = False):
        """Prepare for signals.

        ``is_rank_zero``: whether this is global rank 0, which prints. ``is_local_rank_zero``:
        whether this is local rank 0, which prints that the node's launcher has ended.
        """
        self.stopped_after: int | None = None
        self._is_rank_zero = is_rank_zero
        self._prints_for_node = is_local_rank_zero
        self._launchers = Launchers.find()
        self._got_signal = False
        self._before_leaving: list[Callable[[], None]] = []
        self._requested = Event()
        self._begun = Event()
        self._closed = Event()

    @property
    def exit_code(self) -> int:
        """The exit code of the program if there was no error."""
        return 0 if self.stopped_after is None else EXIT_CODE

    def before_leaving(self, act: Callable[[], None]) -> None:
        """Register ``act`` for an exit from a thread, which runs no atexit handlers."""
        self._before_leaving.append(act)

    def begin(self, consensus: Consensus) -> None:
        """From now on handle signals in ``requested``.

        ``consensus``: used for that alone.
        """
        self._consensus = consensus
        self._begun.set()

    def requested(self, step: int) -> bool:
        """Return whether a stop was requested on any rank, the same on all.

        Called by all ranks once a step; blocks until all have called it.
        """
        stops = self._consensus.any_rank(self._requested.is_set())
        if stops:
            self.stopped_after = step
        return stops

    def close(self, saved: Path | None) -> None:
        """Print, if the run has stopped, how to continue it. ``saved``: its last checkpoint."""
        if self.stopped_after is None:
            return
        how = "nothing is saved: --save is not set"
        if saved:
            how = f"--load {saved.parent} continues from there"
        self._print_stopped(f"after step {self.stopped_after}, {self._reason}; {how}")

    def __enter__(self) -> "Stopping":
        receiver, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        Thread(target=self._listen, args=(receiver,), name="stopping", daemon=True).start()
        if self._launchers:
            Thread(
                target=self._watch_launchers, args=(self._launchers,), name="launcher", daemon=True
            ).start()
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            # Without a Python handler nothing is written to the wake-up descriptor.
            signal.signal(number, lambda *_: None)
            # System calls of libraries must not fail with EINTR either.
            signal.siginterrupt(number, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        """Restore signals: after an error they end the process; otherwise a late one is ignored."""
        has_failed = isinstance(error, Exception)
        if has_failed and self._requested.is_set() and not self._begun.is_set():
            # This rank was about to exit. It failed because others exited a moment earlier.
            self._leave()
        for number in SIGNALS:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if has_failed else signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._wakeup.close()
        self._closed.set()

    def _listen(self, receiver: socket.socket) -> None:
        with receiver:
            first_interrupt = None
            while numbers := receiver.recv(64):  # a byte for each signal; empty once closed
                if signal.SIGINT in numbers:
                    first_interrupt = first_interrupt or time.monotonic()
                    if time.monotonic() - first_interrupt > _SECONDS_OF_ONE_INTERRUPT:
                        self._leave_at_once()
                if not self._requested.is_set() and not set(SIGNALS).isdisjoint(numbers):
                    self._got_signal = True
                    self._requested.set()
                    if not self._begun.wait(_SECONDS_UNTIL_ALL_SIGNALLED):
                        self._leave()

    def _watch_launchers(self, launchers: Launchers) -> None:
        """Stop the run when a launcher ends; exit if the remaining ranks do not finish the step."""
        while not (ended := launchers.ended()):
            if self._closed.wait(_SECONDS_BETWEEN_LAUNCHER_CHECKS):
                return
        self._requested.set()
        if self._prints_for_node:
            pid = f", pid {ended.pid}," if ended.pid else ""
            _print(
                f"warning: the launcher of this rank{pid} has ended. The run stops after this step."
            )
        if not self._begun.wait(_SECONDS_UNTIL_ALL_SIGNALLED):
            self._leave()
        if not self._closed.wait(_SECONDS_WITHOUT_LAUNCHER):
            _print(
                f"stopped          {_SECONDS_WITHOUT_LAUNCHER:.0f} s after its launcher has ended, "
                "within a step"
            )
            os._exit(EXIT_CODE)

    @property
    def _reason(self) -> str:
        """Why the run stops, as far as this rank can see: another may have had a signal first."""
        if not self._got_signal and self._launchers and self._launchers.ended():
            return "as its launcher has ended"
        return "on a signal"

    def _leave_at_once(self) -> None:
        """Exit at the second Ctrl-C; earlier checkpoints stay."""
        _print(
            "stopped          at once, within a step: a second Ctrl-C. Steps since the last "
            "checkpoint are lost"
        )
        for act in self._before_leaving:
            act()
        os._exit(_EXIT_CODE_OF_INTERRUPT)

    def _leave(self) -> None:
        self._print_stopped(f"before the first step, {self._reason}")
        for act in self._before_leaving:
            act()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _print_stopped(self, text: str) -> None:
        if self._is_rank_zero:
            _print(f"stopped          {text}")


def _print(line: str) -> None:
    """Print if possible: a pipe to a launcher that has ended is closed."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
