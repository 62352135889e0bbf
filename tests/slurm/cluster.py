"""A SLURM of three nodes on this machine, munged, slurmctld and slurmd of its own, all that they write in one folder.

It listens on loopback, at ports that were free. The names of its nodes are known only to what they run: each slurmd has
its own view of /etc/hosts. Needs root.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

CONFIG = """\
ClusterName=ring
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
NodeName=node[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]},{ports[3]}
PartitionName=all Nodes=ALL Default=YES
"""
NODES = "node1", "node2", "node3"


class Cluster:
    """Its daemons run while it is entered; they, and whatever they started, end with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self._configure()
        try:
            self._start("munged", "munged", *self._munge_flags())
            until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self._start_node(node)
            until(lambda: self.ask("sinfo", "--noheader", "--format=%T%D") == f"idle{len(NODES)}")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        self._stop()

    def ask(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """What one of SLURM's commands says; raises if it fails."""
        environment = self.environment | (environment or {})
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def kill_node(self, node: str) -> None:
        """As if its power had failed: SIGKILL to its slurmd, and to all that it started, from the parents down."""
        self._daemons.pop(node).kill()
        tasks = [
            process
            for process, variables in self._processes()
            if f"SLURMD_NODENAME={node}" in variables
        ]
        for process in sorted({parent_of(task) for task in tasks} & set(self._own())) + tasks:
            end(process)

    def _configure(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge.key").chmod(0o400)
        host = socket.gethostname().split(".")[0]
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        config = CONFIG.format(folder=self.folder, host=host, ports=free_ports(1 + len(NODES)))
        (self.folder / "slurm.conf").write_text(config)

    def _munge_flags(self) -> list[str]:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        flags = [f"--{flag}={self.folder}/munge.{file}" for flag, file in files.items()]
        return [
            "--foreground",
            "--force",
            *flags,
        ]  # --force: it would have its socket in no folder of pytest's

    def _start_node(self, node: str) -> None:
        """Start its slurmd, for which the names of the nodes are this machine's."""
        see_names = f"mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        self._start(node, "unshare", "--mount", "sh", "-c", see_names)

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("a")
        self._daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log
        )

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        while own := self._own():  # again, for what was just being started
            for process in own:
                end(process)
            time.sleep(0.1)

    def _own(self) -> list[int]:
        """The processes that know this cluster."""
        return [process for process, variables in self._processes()]

    def _processes(self) -> list[tuple[int, list[str]]]:
        """Those of them, and their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended, or is none of ours
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf" in variables:
                found.append((int(folder.name), variables))
        return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)
