"""The launcher that started this rank, and whether it still runs.

``torchrun`` starts ranks itself. ``deepspeed`` starts one ``deepspeed.launcher.launch`` on each
node, which starts the ranks. If a signal that they do not handle kills them, their ranks keep
running, and nothing but the ranks themselves can end those. A rank started by srun, a shell, nohup,
tmux or a program of the user has no launcher here and outlives whatever started it.
"""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_ring.parallel.environment import launched_by_deepspeed, launched_by_torchelastic
from megatron_ring.parallel.process_id import ProcStat

_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate", "accelerate-launch"}
_MODULES = {
    "accelerate.commands.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.launch",
    "torch.distributed.run",
}


@dataclass(frozen=True)
class Launchers:
    """The processes that this rank must not outlive: its ancestors up to the outermost launcher."""

    processes: tuple[ProcStat, ...]

    @staticmethod
    def find() -> "Launchers | None":
        """Find those of this process; None if no launcher started it.

        If the launcher died while this process was still importing, the result is one that has
        ended.
        """
        ancestors = _ancestors()
        depths = [
            depth for depth, process in enumerate(ancestors, start=1) if _is_launcher(process.pid)
        ]
        if depths:
            return Launchers(tuple(ancestors[: depths[-1]]))
        if launched_by_deepspeed():
            return Launchers((ProcStat(pid=0, state="X", parent=0, start=0),))
        # A program of the user may start torch's elastic agent; ranks are its direct children.
        if launched_by_torchelastic() and os.getppid() != 1:
            return Launchers(tuple(ancestors[:1])) if ancestors else None
        return None

    def ended(self) -> ProcStat | None:
        """Return one of them that has ended; None while all run."""
        for process in self.processes:
            if ProcStat.read_running(process.pid, process.start) is None:
                return process
        return None


def _ancestors() -> list[ProcStat]:
    """Return the parent of this process, the parent's parent and so on."""
    ancestors = []
    pid = os.getppid()
    while pid > 0 and (process := ProcStat.read(pid)):
        ancestors.append(process)
        pid = process.parent
    return ancestors


def _is_launcher(pid: int) -> bool:
    """Return whether a process's command line is a known launcher: a program or ``python -m``."""
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
