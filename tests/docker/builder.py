"""Images built and run without an engine: buildah, each step in a chroot, all that it keeps in one folder. Needs root.

A chroot shares this machine's network, so containers meet on its loopback. What it shows of an image is its files,
user, environment and commands; not limits, nor networks of their own.
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
    """Its images and containers, and what runs in them, last while it is entered.

    lent: arguments that give each build step what this machine has, for pip to find packages with. Names of images
    begin with localhost/, so that no registry is asked for them.
    """

    def __init__(self, folder: Path, lent: list[str]):
        self.folder, self.lent = folder, lent
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
        self.ask("rm", "--all")
        self.ask("rmi", "--all", "--force")
        for mount in reversed(
            _mounts_below(self.folder)
        ):  # buildah's own, which hold files that are not ours to delete
            subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(self.folder)

    def ask(self, command: str, *arguments: str) -> str:
        """What one of buildah's commands says; raises, with all that it said, if it fails."""
        done = subprocess.run(
            self._buildah(command, *arguments),
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
        """An image of the files of ``tree``."""
        container = self.ask("from", "scratch")
        self.ask("add", container, str(tree), "/")
        self.ask("commit", "--rm", container, image)

    def build(self, file: str, image: str, base: str) -> None:
        """What ``docker build`` makes of a file of this repository over ``base``."""
        named = ["--file", str(ROOT / file), "--tag", image]
        self.ask("build", *named, f"--build-arg=BASE={base}", *self.lent, str(ROOT))

    def settings(self, image: str) -> dict:
        """What an image says of itself: Env, User, Cmd, Labels and so on."""
        return json.loads(self.ask("inspect", "--type", "image", image))["Docker"]["config"]

    def start(
        self,
        image: str,
        command: list[str],
        environment: Mapping[str, str] = {},
        volumes: Mapping[Path, str] = {},
        user: str = "",
    ) -> subprocess.Popen:
        """``docker run``: a container of its own, as the image's user unless told. volumes: where it sees a folder."""
        container = self.ask("from", image)
        flags = [f"--user={user}"] if user else []
        flags += [f"--env={name}={value}" for name, value in environment.items()]
        flags += [f"--volume={folder}:{place}" for folder, place in volumes.items()]
        run = self._buildah("run", *flags, container, "--", *command)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._running.append(
            subprocess.Popen(run, env=os.environ | CHROOT, start_new_session=True, **pipes)
        )
        return self._running[-1]

    def _buildah(self, command: str, *arguments: str) -> list[str]:
        kept = ["--root", f"{self.folder}/images", "--runroot", f"{self.folder}/run"]
        return ["buildah", *kept, command, *arguments]


def output(process: subprocess.Popen, seconds: float = 600) -> str:
    """All that it said; it must end with 0."""
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, said
    return said


def _mounts_below(folder: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [mount for mount in mounts if Path(mount).is_relative_to(folder)]
