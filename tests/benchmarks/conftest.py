"""A fixture for benchmarks that are run in the test's own process."""

import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def run_main(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[dict, str]]:
    """Return a function that runs a benchmark's ``main`` with flags for its JSON and its output."""
    file = tmp_path / "bench.json"

    def run(benchmark: ModuleType, *flags: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *flags, "--json", str(file)])
        benchmark.main()
        return json.loads(file.read_text()), capsys.readouterr().out

    return run
