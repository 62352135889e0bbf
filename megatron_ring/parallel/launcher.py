"""The launcher that started this rank, and whether it still runs.

``torchrun`` starts ranks itself. ``deepspeed`` starts one ``deepspeed.launcher.launch`` on each node,
which starts the ranks. Killed by a signal that they do not handle, they leave their ranks running, and
nothing but the ranks themselves can end those. A rank that srun, a shell, nohup, tmux or a program of
the user's own has started has no launcher here and outlives whatever started it.
"""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_ring.parallel.environment import launched_by_deepspeed, launched_by_torchelastic
from megatron_ring.parallel.proc_stat import ProcStat

_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate", "accelerate-launch"}
_MODULES = {
    "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch",
    "accelerate.commands.launch",
}  # fmt: skip


@dataclass(frozen=True)
class Launchers:
    """The processes whose end this rank follows: its parent and its parents' parents, up to the outermost launcher."""

    processes: tuple[ProcStat, ...]

    @staticmethod
    def find() -> "Launchers | None":
        """Find those of this process; None where no launcher has started it.

        The launcher may have died while this process was still importing: then it is of one that is gone.
        """
        ancestors = _ancestors()
        known = [
            depth for depth, process in enumerate(ancestors, start=1) if _is_launcher(process.pid)
        ]
        if known:
            return Launchers(tuple(ancestors[: known[-1]]))
        if launched_by_deepspeed():
            return Launchers((ProcStat(pid=0, state="X", parent=0, start=0),))
        # A program of the user's own may start torch's elastic agent; ranks are its direct children.
        if launched_by_torchelastic() and os.getppid() != 1:
            return Launchers(tuple(ancestors[:1])) if ancestors else None
        return None

    def ended(self) -> ProcStat | None:
        """Return one of them that has ended; None while all run."""
        for process in self.processes:
            found = ProcStat.read(process.pid)
            if found is None or found.start != process.start or found.has_ended:
                return process
        return None


def _ancestors() -> list[ProcStat]:
    found = []
    pid = os.getppid()
    while pid > 0 and (process := ProcStat.read(pid)):
        found.append(process)
        pid = process.parent
    return found


def _is_launcher(pid: int) -> bool:
    """Whether a process runs one of the known launchers, by its command line: a program, or ``python -m`` a module."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if Path(words[0]).name in _PROGRAMS:
        return True
    if not Path(words[0]).name.startswith("python"):
        return False
    for word, following in pairwise(words[1:]):
        if word == "-m":
            return following in _MODULES
        if not word.startswith("-"):
            return Path(word).name in _PROGRAMS
    return False
