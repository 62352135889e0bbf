"""What this machine lends to builds: a distribution like its own, and the way in which its pip finds packages."""

import ast
import platform
import shutil
import subprocess
import sys
from pathlib import Path

LENT = "/lent"
"""Where a build step sees this machine's folders."""


def debian(folder: Path) -> Path:
    """The smallest system of this machine's distribution, from where its apt takes packages; returns its root."""
    tree = folder / "debian"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    _said("debootstrap", "--variant=minbase", release, str(tree), _mirror(release))
    # How to reach the mirror: proxies, certificates, time-outs.
    shutil.copytree("/etc/apt/apt.conf.d", tree / "etc/apt/apt.conf.d", dirs_exist_ok=True)
    return tree


def pip_arguments(folder: Path) -> list[str]:
    """buildah's arguments for the secret pip.conf, this machine's configuration, and for the folders that it names."""
    settings = pip_settings()
    lines = [f"{name} = {' '.join(map(_as_lent, words))}" for name, words in settings.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines]))
    local = {_local(word) for words in settings.values() for word in words} - {""}
    volumes = [
        f"--volume=/{top}:{LENT}/{top}:ro" for top in sorted({path.split("/")[1] for path in local})
    ]
    return [f"--secret=id=pip.conf,src={folder}/pip.conf", *volumes]


def pip_settings() -> dict[str, list[str]]:
    """The words of each of this machine's settings. The environment comes before files, in pip's list as in its use."""
    settings: dict[str, list[str]] = {}
    for setting in _said(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = setting.partition("=")
        settings.setdefault(name.rpartition(".")[2], ast.literal_eval(value).split())
    return settings


def _mirror(release: str) -> str:
    targets = _said(
        "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"
    )
    return next(
        uri for codename, uri in map(str.split, targets.splitlines()) if codename == release
    )


def _local(word: str) -> str:
    """The path of a file or folder of this machine, "" for anything else."""
    path = word.removeprefix("file://")
    return path if path.startswith("/") else ""


def _as_lent(word: str) -> str:
    return word.replace(_local(word), LENT + _local(word)) if _local(word) else word


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
