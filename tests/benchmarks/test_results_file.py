"""The JSON file of a benchmark is complete after every row."""

import argparse
import json

from benchmarks.common import ResultsFile, setting


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
