"""The exact versions that `make` and the images install: constraints.txt. Needs nothing but Python.

python tools/constraints.py usable    its lines that fit the torch of this environment, for pip
python tools/constraints.py check     exit code 1 if this environment has other versions or packages
python tools/constraints.py write     write it anew from this environment (make constraints)

torch has no line: the Makefile and the images name its version, and CUDA users may ask for another.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

FILE = Path(__file__).parents[1] / "constraints.txt"
HEAD = """\
# The exact versions of all that `make` and the images install beside torch, as tests ran with them.
# Written by `make constraints`, and in CI where REFRESH_CONSTRAINTS=1 is set (.ci/run): do not edit.
"""
# Not from an index, or installed before this file is read, or part of a torch built for CUDA.
WITHOUT_LINE = re.compile(r"megatron-ring|pip|torch|(nvidia|cuda)-.*")
_OF_TORCH = "triton"  # builds of torch for CUDA name the version that they need, others need none


def installed() -> dict[str, str]:
    """The versions in this environment by name, in pip's spelling and order."""
    found = {_spelled(each.name): each.version for each in metadata.distributions() if each.name}
    return {
        name: version for name, version in sorted(found.items()) if not WITHOUT_LINE.fullmatch(name)
    }


def pins(text: str) -> dict[str, str]:
    """The versions of a constraints file by name."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {
        _spelled(name): version
        for name, _, version in (line.partition("==") for line in lines if line)
    }


def usable(pinned: dict[str, str], needs_of_torch: list[str]) -> dict[str, str]:
    """The pins that fit a torch with these requirements; without any, there is no torch yet."""
    own = not needs_of_torch or any(re.match(rf"{_OF_TORCH}\b", need) for need in needs_of_torch)
    return {name: version for name, version in pinned.items() if not (own and name == _OF_TORCH)}


def differences(pinned: dict[str, str], found: dict[str, str]) -> list[str]:
    """What of an environment is not as it is pinned, a line each."""
    return [
        f"{name} {version} is installed, and constraints.txt has {pinned.get(name, 'no line for it')}"
        for name, version in found.items()
        if pinned.get(name) != version
    ]


def text(pinned: dict[str, str]) -> str:
    """A constraints file."""
    return HEAD + "".join(f"{name}=={version}\n" for name, version in pinned.items())


def _needs_of_torch() -> list[str]:
    """Of the torch in this environment; none where there is none yet."""
    try:
        return metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return []


def _spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(command: str) -> int:
    """Do what the module's docstring has for ``command``; returns the exit code."""
    if command == "write":
        FILE.write_text(text(installed()))
        return 0
    pinned = pins(FILE.read_text())
    if command == "usable":
        print(text(usable(pinned, _needs_of_torch())), end="")
        return 0
    if found := differences(usable(pinned, _needs_of_torch()), installed()):
        print(
            *found,
            "Install anew with make clean, or refresh constraints.txt with make constraints.",
            sep="\n",
        )
    return int(bool(found))


if __name__ == "__main__":
    if sys.argv[1:] not in (["usable"], ["check"], ["write"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
