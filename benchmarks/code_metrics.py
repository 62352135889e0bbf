"""Measure how readable the tree is: file sizes, importers, line lengths, words of the old dialect.

    python -m benchmarks.code_metrics
    git worktree add /tmp/before 12b39ab
    python -m benchmarks.code_metrics --root /tmp/before --root .

Each root becomes a column, so that two checkouts can be compared. Only tracked files count.
"""

import ast
import re
import statistics
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import tyro

PACKAGE = "megatron_ring"
SHORT_FILE = 60
LONG_LINE = 100
# Words that the code once used with a private meaning. The remaining uses were read one by one and
# are ordinary English.
DIALECT = ("told", "tells", "nobody", "whoever", "behind", "said", "says")


def main(root: tuple[Path, ...] = (Path("."),)) -> None:
    """Print a Markdown table with one column per checkout.

    Args:
        root: Checkouts to measure.
    """
    columns = [measure(folder) for folder in root]
    print("| | " + " | ".join(str(folder) for folder in root) + " |")
    print("| --- |" + " ---: |" * len(root))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column in columns) + " |")


def measure(root: Path) -> dict[str, int | float]:
    """Return all figures of the checkout ``root`` by name."""
    tracked = _tracked(root)
    modules = [path for path in tracked if path.parts[0] == PACKAGE and path.suffix == ".py"]
    python = [path for path in tracked if path.suffix == ".py"]
    documents = [
        path
        for path in tracked
        if path.suffix == ".md" and path.name not in ("CHANGELOG.md", "log.md")
    ]
    lengths = {path: len((root / path).read_text().splitlines()) for path in modules}
    importers = _importers(root, modules)
    all_lines = [line for path in python for line in (root / path).read_text().splitlines()]
    package_lines = [line for path in modules for line in (root / path).read_text().splitlines()]
    names = Counter(path.stem for path in modules if path.stem != "__init__")
    figures: dict[str, int | float] = {
        "files of the package": len(modules),
        "median lines of a file": statistics.median(lengths.values()),
        f"files under {SHORT_FILE} lines": sum(n < SHORT_FILE for n in lengths.values()),
        "modules with one importer": sum(len(by) == 1 for by in importers.values()),
        "base names used twice": sum(count > 1 for count in names.values()),
        f"lines over {LONG_LINE} columns, package": _long(package_lines),
        f"lines over {LONG_LINE} columns, all Python": _long(all_lines),
        "lines of README.md": len((root / "README.md").read_text().splitlines()),
    }
    for word in DIALECT:
        uses = re.compile(rf"(?<![A-Za-z]){word}(?![A-Za-z])")
        figures[f'"{word}" in Python and documents'] = sum(
            len(uses.findall((root / path).read_text())) for path in [*python, *documents]
        )
    return figures


def _tracked(root: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    )
    return [Path(name) for name in listed.stdout.splitlines() if (root / name).is_file()]


def _long(lines: list[str]) -> int:
    return sum(len(line) > LONG_LINE for line in lines)


def _importers(root: Path, modules: list[Path]) -> dict[str, set[str]]:
    """Return the modules of the package that import each of its modules."""
    by_name = {_dotted(path): path for path in modules}
    importers: dict[str, set[str]] = defaultdict(set)
    for name, path in by_name.items():
        for node in ast.walk(ast.parse((root / path).read_text())):
            for imported in _imported(node, by_name):
                if imported != name:
                    importers[imported].add(name)
    return importers


def _imported(node: ast.AST, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    if isinstance(node, ast.ImportFrom) and node.module:
        # ``from package import module`` names a module, ``from module import name`` does not.
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found = [module for module in modules if module in known]
        if len(found) < len(modules) and node.module in known:
            found.append(node.module)
        return found
    return []


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    tyro.cli(main)
