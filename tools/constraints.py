"""Manage constraints.txt, the exact versions that `make` and the images install.

python tools/constraints.py usable    print its lines that fit the installed torch, for pip
python tools/constraints.py check     exit with 1 if other versions or packages are installed
python tools/constraints.py write     write it from the installed packages (make constraints)

Needs nothing but Python. torch has no line: the Makefile and the images specify its version, and
CUDA users may ask for another.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

FILE = Path(__file__).parents[1] / "constraints.txt"
HEAD = """\
# The exact versions of all that `make` and the images install beside torch, as tests ran with them.
# Written by `make constraints`, also in CI if REFRESH_CONSTRAINTS=1 is set (.ci/run): do not edit.
"""
# Packages without a line: not from an index, installed before the file is read, or part of a torch
# built for CUDA.
WITHOUT_LINE = re.compile(r"megatron-ring|pip|torch|(nvidia|cuda)-.*")
# Builds of torch for CUDA require one version of it; other builds do not require it.
_TRITON = "triton"


def installed() -> dict[str, str]:
    """Return the installed versions by canonical name, sorted by name."""
    versions = {
        canonical_name(distribution.name): distribution.version
        for distribution in metadata.distributions()
        if distribution.name
    }
    return {
        name: version
        for name, version in sorted(versions.items())
        if not WITHOUT_LINE.fullmatch(name)
    }


def pins(text: str) -> dict[str, str]:
    """Return the versions by name from the text of a constraints file."""
    versions = {}
    for line in text.splitlines():
        pin = line.partition("#")[0].strip()
        if pin:
            name, _, version = pin.partition("==")
            versions[canonical_name(name)] = version
    return versions


def usable(pinned: dict[str, str], torch_requirements: list[str]) -> dict[str, str]:
    """Return the pins that fit a torch with these requirements.

    Without requirements torch is not installed yet. It may then require its own Triton, so the pin
    of Triton is left out.
    """
    requires_triton = any(re.match(rf"{_TRITON}\b", line) for line in torch_requirements)
    if torch_requirements and not requires_triton:
        return dict(pinned)
    return {name: version for name, version in pinned.items() if name != _TRITON}


def differences(pinned: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return a line for each installed package whose version is not the pinned one."""
    lines = []
    for name, version in found.items():
        if pinned.get(name) != version:
            pin = pinned.get(name, "no line for it")
            lines.append(f"{name} {version} is installed, but constraints.txt has {pin}")
    return lines


def text(pinned: dict[str, str]) -> str:
    """Return the text of a constraints file with these pins."""
    return HEAD + "".join(f"{name}=={version}\n" for name, version in pinned.items())


def canonical_name(name: str) -> str:
    """Return a package's name in the spelling by which pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _torch_requirements() -> list[str]:
    """Return the requirements of the installed torch, none if it is not installed."""
    try:
        return metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return []


def main(command: str) -> int:
    """Run one of the three commands and return the exit code."""
    if command == "write":
        FILE.write_text(text(installed()))
        return 0
    pinned = usable(pins(FILE.read_text()), _torch_requirements())
    if command == "usable":
        print(text(pinned), end="")
        return 0
    found = differences(pinned, installed())
    if found:
        print(*found, sep="\n")
        print("Reinstall with make clean, or update constraints.txt with make constraints.")
    return int(bool(found))


if __name__ == "__main__":
    if sys.argv[1:] not in (["usable"], ["check"], ["write"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
