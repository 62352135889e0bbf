"""Print pip constraints that protect the packages of a base image with its own torch.

python docker/base.py                    pins of the installed packages compiled for its GPUs
python docker/base.py constraints.txt    these, and the pins of that file for missing packages
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

COMPILED = re.compile(r"apex|flash-attn.*|numpy|torch.*|transformer-engine.*|.*triton")
"""Packages to keep; NumPy too, because the others were compiled for the base's version of it."""


def installed() -> dict[str, str]:
    """Return the versions of the installed packages by canonical name, sorted by name."""
    named = [each for each in distributions() if each.name]
    return dict(sorted((_canonical_name(each.name), each.version) for each in named))


def compiled_pins(packages: dict[str, str]) -> list[str]:
    """Return constraints that keep the compiled ones of ``packages`` at their versions."""
    return [f"{name}=={version}" for name, version in packages.items() if COMPILED.fullmatch(name)]


def pins_of_missing(pins: list[str], packages: dict[str, str]) -> list[str]:
    """Return those of ``pins`` whose package is not among ``packages``."""
    return [
        pin
        for pin in pins
        if "==" in pin and _canonical_name(pin.partition("==")[0]) not in packages
    ]


def _canonical_name(name: str) -> str:
    """Return a package's name in the spelling by which pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    packages = installed()
    pins = [line for file in sys.argv[1:] for line in Path(file).read_text().splitlines()]
    print(*compiled_pins(packages), *pins_of_missing(pins, packages), sep="\n")
