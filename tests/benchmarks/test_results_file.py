"""The JSON file of a benchmark is complete after every row, and checked before measuring."""

import argparse
import importlib
import json
import re

import pytest

from benchmarks.common import ResultsFile, check_outputs, setting, write_json
from megatron_ring.errors import ConfigError
from tests.benchmarks.commands import ROOT

# Flags without which a benchmark ends with another error before it reads --json.
NEEDED_FLAGS = {
    "bench_gpu": ["--device", "cpu"],
    "bench_inference": ["decode"],
    "bench_profile": ["--device", "cpu"],
    "bench_step": ["--device", "cpu"],
    "trace_overlap": ["--device", "cpu"],
}
WITH_JSON = [
    path.stem
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if re.search(r'^    json: str|"--json"', path.read_text(), re.M)
    and "__main__" in path.read_text()
]


def test_every_row_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "results" / "bench.json"
    results = ResultsFile(str(path), {"device": "a GPU"})
    assert json.loads(path.read_text()) == {"device": "a GPU"}
    results.add("rows", {"ms": 1})
    results.add("rows", {"ms": 2})
    results.add("others", 3)
    assert json.loads(path.read_text()) == {
        "device": "a GPU",
        "rows": [{"ms": 1}, {"ms": 2}],
        "others": [3],
    }
    assert list(path.parent.iterdir()) == [path]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = ResultsFile("", {})
    results.add("rows", 1)
    assert results.findings == {"rows": [1]}
    assert list(tmp_path.iterdir()) == []


def test_the_setting_has_the_command_that_repeats_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bench_gpu.py", "--tokens", "512"])
    found = setting("bench_gpu", argparse.Namespace(tokens=512), "cpu")
    assert found["command"] == "python -m benchmarks.bench_gpu --tokens 512"
    assert found["options"] == {"tokens": 512}
    assert found["device"] == "CPU"


@pytest.mark.parametrize("name", [name for name in WITH_JSON if name != "tune_blocks"])
def test_a_file_that_cannot_be_written_ends_a_benchmark_before_it_measures(
    name, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    flags = [*NEEDED_FLAGS.get(name, []), "--json", str(tmp_path / "file" / "results.json")]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flags])
    monkeypatch.setenv("WORLD_SIZE", "2" if name == "bench_overlap" else "1")
    with pytest.raises(ConfigError, match="json .*results.json cannot be written.*Set --json"):
        importlib.import_module(f"benchmarks.{name}").main()


def test_all_outputs_that_cannot_be_written_are_one_error_and_none_is_created(tmp_path):
    existing = tmp_path / "existing.json"
    existing.write_text("{}")
    check_outputs(json=existing, plot=tmp_path / "new" / "plot.svg", output="")
    assert sorted(tmp_path.rglob("*")) == [existing, tmp_path / "new"]
    with pytest.raises(ConfigError) as raised:
        check_outputs(json=tmp_path, plot=existing / "plot.svg", output="/dev/null")
    of_json, of_plot = raised.value.problems
    assert "--json" in of_json
    assert "--plot" in of_plot


def test_results_replace_the_previous_file_as_a_whole(tmp_path):
    path = tmp_path / "results.json"
    write_json(str(path), {"first": 1})
    with pytest.raises(TypeError):
        write_json(str(path), {"second": object()})
    assert json.loads(path.read_text()) == {"first": 1}
    write_json("/dev/null", {"third": 3})
    assert list(tmp_path.iterdir()) == [path]
