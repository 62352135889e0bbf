"""Print what an image installs before the program itself: its dependencies, monitors and readers of data included."""

import sys
import tomllib
from pathlib import Path

EXTRAS = "data", "monitor"


def requirements(pyproject: Path) -> list[str]:
    """One requirement a line, as pip reads them."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [
        requirement for extra in EXTRAS for requirement in extras[extra]
    ]


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1])), sep="\n")
