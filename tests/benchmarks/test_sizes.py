"""Sizes that a benchmark cannot run with are one ConfigError, before anything is measured."""

import importlib
import sys

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError

CASES = [
    ("bench_attention", ["--nproc", "0"], "nproc 0 .*at least 1.*--nproc"),
    ("bench_attention", ["--heads", "3", "--kv-heads", "2"], "heads 3 .*kv_heads 2"),
    ("bench_gpu", ["--device", "cpu", "--tokens", "64", "-1"], "tokens -1 .*at least 1.*--tokens"),
    ("bench_gpu", ["--device", "cpu", "--ring-sizes", "0"], "ring_sizes 0 .*--ring-sizes"),
    ("bench_gpu", ["--device", "cpu", "--rounds", "0"], "rounds 0 .*--rounds"),
    ("bench_gpu", ["--device", "cpu", "--heads", "3", "--kv-heads", "2"], "heads 3 .*kv_heads 2"),
    ("bench_head", ["--tokens"], "tokens is empty.*--tokens"),
    ("bench_placement", [], "1 rank .*at least 2"),
    ("bench_step", ["--steps", "0"], "steps 0 .*at least 1.*--steps"),
    ("count_elementwise", ["--recompute"], "recompute is empty.*--recompute"),
    ("count_pack_traffic", ["--ranks", "0"], "ranks 0 .*at least 1.*--ranks"),
    ("count_pack_traffic", ["--mean-document", "0"], "mean_document 0 .*--mean-document"),
    ("measure_memory", ["--budget-mib", "nan"], "budget_mib nan .*finite.*--budget-mib"),
    ("tune_blocks", ["--jobs", "0"], "jobs 0 .*at least 1.*--jobs"),
]


@pytest.mark.parametrize(("name", "flags", "message"), CASES)
def test_impossible_sizes_are_rejected(name, flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(ConfigError, match=message):
        importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--documents", "equal:0"], "documents equal:0 .*--documents"),
        (["--seq-length", "13"], "seq_length 13 .*2 ranks.*--seq-length"),
        (["--slowdown", "1"], "slowdown 1.* above 1.*--slowdown"),
    ],
)
def test_ranks_of_bench_placement_reject_bad_options_before_they_join(flags, message, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["bench_placement.py", *flags])
    with pytest.raises(ConfigError, match=message):
        importlib.import_module("benchmarks.bench_placement").main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_gpu_benchmark_without_a_gpu_is_one_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(ConfigError, match="no GPU.*--device cpu"):
        importlib.import_module("benchmarks.bench_gpu").main()


def test_a_ring_without_ranks_has_no_layout():
    with pytest.raises(ConfigError, match="ring of 0 ranks"):
        Layout("striped", 32, 0)
