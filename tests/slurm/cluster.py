"""A SLURM cluster of three nodes on this machine: munged, slurmctld and one slurmd per node.

Everything that they write is in one folder. They listen on loopback, on free ports. Node names
resolve only within the cluster: each slurmd has its own view of /etc/hosts. Needs root.
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
NODES = ("node1", "node2", "node3")


class Cluster:
    """A context within which the cluster runs; leaving it kills all of its processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self._configure()
        try:
            self._start("munged", "munged", *self._munge_flags())
            wait_until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self._start_node(node)
            wait_until(self._all_nodes_are_idle)
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

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """Run a SLURM command and return its output; fail with the output if it fails."""
        environment = self.environment | (environment or {})
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def kill_node(self, node: str) -> None:
        """Simulate a power failure: SIGKILL the node's slurmd and all that it started.

        Parents of tasks are killed before the tasks.
        """
        self._daemons.pop(node).kill()
        tasks = [
            pid
            for pid, variables in self._environments().items()
            if f"SLURMD_NODENAME={node}" in variables
        ]
        parents = {parent_of(task) for task in tasks} & self._environments().keys()
        for pid in [*sorted(parents), *tasks]:
            kill(pid)

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
        # Without --force munged refuses to create its socket in a folder of pytest's.
        return ["--foreground", "--force", *flags]

    def _start_node(self, node: str) -> None:
        """Start a slurmd for which the names of all nodes resolve to this machine."""
        command = f"mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        self._start(node, "unshare", "--mount", "sh", "-c", command)

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("a")
        self._daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log
        )

    def _all_nodes_are_idle(self) -> bool:
        return self.run("sinfo", "--noheader", "--format=%T%D") == f"idle{len(NODES)}"

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        # Repeated, because a killed process may just have started another.
        while pids := self._environments():
            for pid in pids:
                kill(pid)
            time.sleep(0.1)

    def _environments(self) -> dict[int, list[str]]:
        """Return the environment of each process of this cluster by process id."""
        environments = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # the process has ended, or belongs to another user
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf" in variables:
                environments[int(folder.name)] = variables
        return environments


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Return ``count`` different free ports."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds:g} s"
        time.sleep(0.2)
