"""Stopping in order: a rank hears a signal, all end after the same step, with a checkpoint, to be started again.

SIGUSR1 is what SLURM is asked to send before a time limit, SIGTERM what preemption and launchers send, SIGINT Ctrl-C; a
second Ctrl-C leaves at once, without a checkpoint. The exit code is
EX_TEMPFAIL: start the same command again, with --load. srun hands signals on to every rank. torchrun hands on SIGTERM,
waits 30 s, and ends with 1; it dies of SIGUSR1. The ``deepspeed`` command dies of each of them.

A rank whose launcher has ended (parallel/launcher.py) stops in the same way: no signal of the user's would reach it any
more, and nobody would wait for it. Other nodes may be alive, so that the checkpoint is worth writing.
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
_SECONDS_OF_ONE_INTERRUPT = 2

# All ranks are told within a moment of each other. One that left before the rest have heard would fail them.
_SECONDS_TO_HEAR = 1

_SECONDS_BETWEEN_LOOKS = 1.0
# As long as pretrain.sbatch gives the ranks that are left: for the step at hand and a checkpoint.
_SECONDS_WITHOUT_LAUNCHER = 900.0


class Stopping:
    """Whether this run is to stop, and after which step it did.

    Within it signals are heard by a thread: the main one may be in a library's call, waiting for ranks that never come.
    Before ``begin`` they end the process; a rank that alone is told so leaves the rest to its launcher.
    """

    def __init__(self, is_rank_zero: bool, speaks_for_node: bool = False):
        """``is_rank_zero``: on global rank 0. ``speaks_for_node``: on local rank 0; reports its launcher's end."""
        self.stopped_after: int | None = None
        self._speaks_for_node, self._over = speaks_for_node, Event()
        self._launchers, self._signalled = Launchers.find(), False
        self._before_leaving: list[Callable[[], None]] = []
        self._speaks, self._told, self._begun = is_rank_zero, Event(), Event()

    @property
    def exit_code(self) -> int:
        """What to leave with when nothing failed."""
        return 0 if self.stopped_after is None else EXIT_CODE

    def before_leaving(self, act: Callable[[], None]) -> None:
        """Have ``act`` done before this process is left from a thread, which runs no exit handlers."""
        self._before_leaving.append(act)

    def begin(self, consensus: Consensus) -> None:
        """From now on ``agreed`` answers the signals, over ``consensus``, which must be its alone."""
        self._consensus = consensus
        self._begun.set()

    def agreed(self, step: int) -> bool:
        """Whether any rank has been told to stop, the same on all. All ask once a step; blocks until they have."""
        told = self._consensus.any_rank(self._told.is_set())
        if told:
            self.stopped_after = step
        return told

    def close(self, saved: Path | None) -> None:
        """Say, if it has stopped, how it goes on. ``saved``: its last checkpoint."""
        if self.stopped_after is not None:
            kept = (
                f"--load {saved.parent} goes on from there"
                if saved
                else "nothing is kept: --save is not set"
            )
            self._say(f"after step {self.stopped_after}, as {self._why}; {kept}")

    def __enter__(self) -> "Stopping":
        hearing, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        Thread(target=self._listen, args=(hearing,), name="stopping", daemon=True).start()
        if self._launchers:
            Thread(
                target=self._follow, args=(self._launchers,), name="launcher", daemon=True
            ).start()
        signal.set_wakeup_fd(self._ear.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(
                number, lambda *_: None
            )  # without a handler of Python's the wake-up is not written
            signal.siginterrupt(
                number, False
            )  # nor are the system calls of libraries to fail with EINTR
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        """One that failed ends at a signal; one that is done, or has stopped, is not hurt by a late or second one."""
        if isinstance(error, Exception) and self._told.is_set() and not self._begun.is_set():
            self._leave()  # it was about to; those who were a moment quicker have failed it
        for number in SIGNALS:
            failed = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, failed if isinstance(error, Exception) else signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._ear.close()
        self._over.set()

    def _listen(self, hearing: socket.socket) -> None:
        with hearing:
            interrupted = None
            while numbers := hearing.recv(64):  # a byte for each signal; none once closed
                if signal.SIGINT in numbers:
                    interrupted = interrupted or time.monotonic()
                    if time.monotonic() - interrupted > _SECONDS_OF_ONE_INTERRUPT:
                        self._leave_at_once()
                if not self._told.is_set() and not set(SIGNALS).isdisjoint(numbers):
                    self._signalled = True
                    self._told.set()
                    if not self._begun.wait(_SECONDS_TO_HEAR):
                        self._leave()

    def _follow(self, launchers: Launchers) -> None:
        """Stop the run when a launcher ends; leave where the ranks that are left do not come to the end of a step."""
        while not (ended := launchers.ended()):
            if self._over.wait(_SECONDS_BETWEEN_LOOKS):
                return
        self._told.set()
        if self._speaks_for_node:
            of = f", pid {ended.pid}," if ended.pid else ""
            _print(
                f"warning: the launcher of this rank{of} has ended. The run stops after this step."
            )
        if not self._begun.wait(_SECONDS_TO_HEAR):
            self._leave()
        if not self._over.wait(_SECONDS_WITHOUT_LAUNCHER):
            _print(
                f"stopped          {_SECONDS_WITHOUT_LAUNCHER:.0f} s after its launcher has ended, within a step"
            )
            os._exit(EXIT_CODE)

    @property
    def _why(self) -> str:
        """Why the run stops, as far as this rank can see: another one may have been told first."""
        launcher_ended = not self._signalled and self._launchers and self._launchers.ended()
        return "its launcher has ended" if launcher_ended else "a signal asked"

    def _leave_at_once(self) -> None:
        """Leave at the second Ctrl-C; checkpoints that were saved before stay."""
        _print(
            "stopped          at once, within a step: a second Ctrl-C. Steps since the last checkpoint are lost"
        )
        for act in self._before_leaving:
            act()
        os._exit(_EXIT_CODE_OF_INTERRUPT)

    def _leave(self) -> None:
        self._say(f"before the first step, as {self._why}")
        for act in self._before_leaving:
            act()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _say(self, words: str) -> None:
        if self._speaks:
            _print(f"stopped          {words}")


def _print(line: str) -> None:
    """Print where that is possible: a pipe to a launcher that has ended is closed."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
