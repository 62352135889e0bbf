"""Print the dependencies that an image installs before the program itself.

python docker/requirements.py pyproject.toml

They include the extras for monitors and for reading other data formats.
"""

import sys
import tomllib
from pathlib import Path

EXTRAS = ("data", "monitor")


def requirements(pyproject: Path) -> list[str]:
    """Return the requirements as pip reads them, one per item."""
    project = tomllib.loads(pyproject.read_text())["project"]
    required = list(project["dependencies"])
    for extra in EXTRAS:
        required += project["optional-dependencies"][extra]
    return required


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1])), sep="\n")
