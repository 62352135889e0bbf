import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--seq-length", "48", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--rounds", "1"]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "bench_attention.py", *SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "setting", "emulated"),
    [
        (["--nproc", "2"], "2 ranks", False),
        (["--emulate-ranks", "3"], "3 emulated ranks, communication not counted", True),
    ],
)
def test_every_layout_is_timed_beside_one_process(arguments, setting, emulated, tmp_path):
    done = bench(*arguments, "--json", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "bench.json").read_text())
    assert set(document) == {"setting", "device", "emulated", "options", "single_seconds", "results"}
    assert (document["setting"], document["emulated"]) == (setting, emulated)
    assert document["options"]["seq_length"] == 48
    assert document["single_seconds"] > 0
    assert [result["layout"] for result in document["results"]] == ["ring", "striped", "zigzag"]
    for result in document["results"]:
        assert set(result) == {
            "layout",
            "seconds",
            "speedup_over_ring",
            "bound",
            "efficiency",
            "imbalance_counted",
            "imbalance_timed",
        }
        assert result["seconds"] > 0
        assert (result["imbalance_timed"] is not None) == emulated
        assert result["layout"] in done.stdout


def test_lengths_that_cannot_be_laid_out_leave_with_the_configs_exit_code():
    done = bench("--seq-length", "47")
    assert done.returncode == 2
    assert "seq_length 47 cannot be laid out ring on 2 ring ranks" in done.stderr
    assert "Traceback" not in done.stderr
