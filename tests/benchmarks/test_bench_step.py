"""The benchmark of a training step, at sizes for a CPU: variants, shares, failures, time limit."""

import argparse
import json
import multiprocessing

import pytest

from benchmarks import bench_step
from benchmarks.step_profile import CATEGORIES
from megatron_ring.errors import ConfigError
from tests.distributed import PRELOADED

SMALL = ["--layers", "2", "--hidden", "64", "--heads", "2", "--ffn", "96", "--vocab", "64"]
SMALL += ["--tokens", "128", "--dtype", "fp32"]
SMALL += ["--mean-document", "40", "--steps", "1", "--device", "cpu"]


@pytest.fixture
def run_steps(monkeypatch, tmp_path, capsys):
    """Return a function that runs the benchmark, its processes forked from one with its imports."""
    file = tmp_path / "steps.json"

    def run(*flags: str) -> tuple[dict, str, int]:
        multiprocessing.set_forkserver_preload(PRELOADED)
        monkeypatch.setattr(bench_step, "START_METHOD", "forkserver")
        monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr("sys.argv", ["bench_step.py", *SMALL, *flags, "--json", str(file)])
        with pytest.raises(SystemExit) as ended:
            bench_step.main()
        return json.loads(file.read_text()), capsys.readouterr().out, ended.value.code

    return run


def test_every_variant_is_timed_and_split(run_steps):
    findings, stdout, code = run_steps()
    assert code == 0
    rows = {row["variant"]: row for row in findings["variants"]}
    assert rows.keys() == set(bench_step.VARIANTS)
    for name, row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(128e3 / row["step_ms"])
        assert 0 < row["share_of_peak"] < 1
        assert row["split_ms"].keys() == set(CATEGORIES)
        assert row["split_ms"]["attention"] > 0
        assert row["split_ms"]["matrix products"] > 0
        assert row["split_ms"]["optimizer"] > 0
        assert name in stdout
    # Documents have fewer visible pairs, so the same speed would be a smaller share.
    per_token = {name: row["tflops"] / row["tokens_per_second"] for name, row in rows.items()}
    assert per_token["documents"] < per_token["default"] == pytest.approx(per_token["torch"])


def test_without_a_gpu_it_is_refused_with_the_flag(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_step.py"])
    with pytest.raises(ConfigError, match="torch finds no GPU.*--device cpu"):
        bench_step.main()


def test_a_variant_that_fails_is_reported_and_the_next_one_is_measured(run_steps):
    findings, stdout, code = run_steps("--variants", "torch", "documents", "--heads", "3")
    assert code == 1
    first, second = findings["variants"]
    assert "hidden_size 64" in first["error"]
    assert "error" in second
    assert first["error"] in stdout


def test_without_time_all_variants_are_skipped_and_the_file_has_the_setting(run_steps):
    findings, stdout, code = run_steps("--minutes", "-1")
    assert code == 0
    assert "variants" not in findings
    assert findings["benchmark"] == "bench_step"
    assert findings["command"].startswith("python -m benchmarks.bench_step --layers 2")
    assert stdout.count("skipped, out of time") == 4


def test_the_default_model_has_the_parameters_that_the_documents_name():
    options = bench_step._parser().parse_args([])
    assert isinstance(options, argparse.Namespace)
    config = bench_step.config("default", options)
    assert (config.model.num_layers, config.data.seq_length) == (24, 32768)
    assert bench_step._flops("default", options) / options.tokens == pytest.approx(17.0e9, rel=0.02)
