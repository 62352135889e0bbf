"""Builds and runs images without a container engine, by buildah with chroot isolation.

Everything is kept in one folder. Needs root. A chroot shares this machine's network, so containers
reach each other on its loopback. It shows an image's files, user, environment and commands, but
neither resource limits nor separate networks.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
CHROOT = {"BUILDAH_ISOLATION": "chroot", "BUILDAH_FORMAT": "docker"}


class Builder:
    """A context within which images and containers exist and processes run in them.

    Args:
        folder: Where images and containers are kept; deleted at the end.
        build_arguments: Arguments for every build step, with which pip finds packages as it does
            on this machine.

    Image names must begin with localhost/, so that no registry is contacted.
    """

    def __init__(self, folder: Path, build_arguments: list[str]):
        self.folder = folder
        self.build_arguments = build_arguments
        self._running: list[subprocess.Popen] = []

    def __enter__(self) -> "Builder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        # buildah's own mounts show files of this machine, which must not be deleted.
        for mount in reversed(_mounts_below(self.folder)):
            subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(self.folder)

    def buildah(self, command: str, *arguments: str) -> str:
        """Run a buildah command and return its output; fail with its whole output if it fails."""
        done = subprocess.run(
            self._command(command, *arguments),
            capture_output=True,
            text=True,
            env=os.environ | CHROOT,
            timeout=1800,
        )
        assert done.returncode == 0, (
            f"buildah {command} {arguments}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
        return done.stdout.strip()

    def pack(self, tree: Path, image: str) -> None:
        """Create an image from the files below ``tree``."""
        container = self.buildah("from", "scratch")
        self.buildah("add", container, str(tree), "/")
        self.buildah("commit", "--rm", container, image)

    def build(self, file: str, image: str, base: str) -> None:
        """Build a Dockerfile of this repository on ``base``, as ``docker build`` does."""
        names = ["--file", str(ROOT / file), "--tag", image]
        self.buildah("build", *names, f"--build-arg=BASE={base}", *self.build_arguments, str(ROOT))

    def settings(self, image: str) -> dict:
        """Return the configuration of an image: Env, User, Cmd, Labels and so on."""
        return json.loads(self.buildah("inspect", "--type", "image", image))["Docker"]["config"]

    def start(
        self,
        image: str,
        command: list[str],
        environment: Mapping[str, str] = {},
        volumes: Mapping[Path, str] = {},
        user: str = "",
    ) -> subprocess.Popen:
        """Start a command in a new container, as ``docker run`` does.

        Args:
            volumes: Folders of this machine and where the container mounts them.
            user: Empty: the image's own user.
        """
        container = self.buildah("from", image)
        flags = [f"--user={user}"] if user else []
        flags += [f"--env={name}={value}" for name, value in environment.items()]
        flags += [f"--volume={folder}:{target}" for folder, target in volumes.items()]
        process = subprocess.Popen(
            self._command("run", *flags, container, "--", *command),
            env=os.environ | CHROOT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._running.append(process)
        return process

    def _command(self, command: str, *arguments: str) -> list[str]:
        folders = ["--root", f"{self.folder}/images", "--runroot", f"{self.folder}/run"]
        return ["buildah", *folders, command, *arguments]


def output(process: subprocess.Popen, seconds: float = 600) -> str:
    """Wait for a process to exit with 0 and return its output."""
    stdout, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, stdout
    return stdout


def _mounts_below(folder: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [mount for mount in mounts if Path(mount).is_relative_to(folder)]
