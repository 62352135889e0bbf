"""What image builds get from this machine: its distribution and its pip configuration."""

import ast
import platform
import shutil
import subprocess
import sys
from pathlib import Path

MOUNT = "/lent"
"""Where a build step finds folders of this machine."""


def debian(folder: Path) -> Path:
    """Install a minimal system of this machine's release from its apt mirror; return its root."""
    tree = folder / "debian"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    _output("debootstrap", "--variant=minbase", release, str(tree), _mirror(release))
    # How to reach the mirror: proxies, certificates, timeouts.
    shutil.copytree("/etc/apt/apt.conf.d", tree / "etc/apt/apt.conf.d", dirs_exist_ok=True)
    return tree


def pip_arguments(folder: Path) -> list[str]:
    """Return buildah arguments that give builds this machine's pip configuration.

    They are the secret pip.conf, which is written to ``folder``, and the folders that it names.
    """
    lines = ["[global]"]
    folders = set()
    for name, words in pip_settings().items():
        lines.append(f"{name} = {' '.join(map(_as_mounted, words))}")
        folders |= {path.split("/")[1] for word in words if (path := _local_path(word))}
    (folder / "pip.conf").write_text("\n".join(lines))
    volumes = [f"--volume=/{top}:{MOUNT}/{top}:ro" for top in sorted(folders)]
    return [f"--secret=id=pip.conf,src={folder}/pip.conf", *volumes]


def pip_settings() -> dict[str, list[str]]:
    """Return the words of each pip setting of this machine.

    The environment overrides files: pip lists it first.
    """
    settings: dict[str, list[str]] = {}
    for setting in _output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = setting.partition("=")
        settings.setdefault(name.rpartition(".")[2], ast.literal_eval(value).split())
    return settings


def _mirror(release: str) -> str:
    targets = _output(
        "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"
    )
    for line in targets.splitlines():
        codename, uri = line.split()
        if codename == release:
            return uri
    raise LookupError(f"apt has no mirror of {release}")


def _local_path(word: str) -> str:
    """Return the path that a setting's word names on this machine, "" for anything else."""
    path = word.removeprefix("file://")
    return path if path.startswith("/") else ""


def _as_mounted(word: str) -> str:
    path = _local_path(word)
    return word.replace(path, MOUNT + path) if path else word


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
