"""What pip may not change in an image that brings its own torch, as pip's constraints.

python docker/base.py                    the packages of this environment that are compiled for its GPUs
python docker/base.py constraints.txt    these, and the lines of that file for what this environment has not
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

COMPILED = re.compile(r"apex|flash-attn.*|numpy|torch.*|transformer-engine.*|.*triton")
"""NumPy among them: the others were compiled for the base's."""


def installed() -> dict[str, str]:
    """Versions by name, in the spelling that pip compares by, and in its order."""
    return dict(
        sorted((_spelled(found.name), found.version) for found in distributions() if found.name)
    )


def kept(packages: dict[str, str]) -> list[str]:
    """Constraints that hold ``packages`` to their versions, as far as they are compiled."""
    return [f"{name}=={version}" for name, version in packages.items() if COMPILED.fullmatch(name)]


def missing(pins: list[str], packages: dict[str, str]) -> list[str]:
    """Those of ``pins`` that are of none of ``packages``."""
    return [pin for pin in pins if "==" in pin and _spelled(pin.partition("==")[0]) not in packages]


def _spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    packages = installed()
    pins = [line for file in sys.argv[1:] for line in Path(file).read_text().splitlines()]
    print(*kept(packages), *missing(pins, packages), sep="\n")
