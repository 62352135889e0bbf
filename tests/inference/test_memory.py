"""Counted memory against what is allocated, and a refusal of what does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.live_memory import LiveBytes
from megatron_ring.config import ModelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.inference import memory
from megatron_ring.inference.generation import generate
from megatron_ring.inference.loading import OpenedModel, load, open_model
from megatron_ring.inference.memory import Work
from megatron_ring.inference.model import InferenceModel
from megatron_ring.inference.sampling import Sampler
from tests.distributed import run_ranks
from tests.inference import models

# Wide enough that activations are most of what is allocated.
WIDE = ModelConfig(num_layers=3, hidden_size=128, num_attention_heads=4, num_query_groups=2)
LENGTH = 2048


def write(folder: Path, model: ModelConfig) -> Path:
    gpt = models.random_model(model, length=LENGTH)
    models.write_checkpoint(folder, gpt, model, seq_length=LENGTH)
    return folder


def measured(rank: int, world_size: int, folder: Path, chunk: int) -> dict[str, int]:
    options = models.options(folder, prefill_chunk_size=chunk)
    loaded = load(options, models.environment(rank, world_size))
    core = InferenceModel(loaded.model, loaded.groups, kernel=loaded.kernel, device="cpu")
    prompt = [token % 50 for token in range(1000)]
    cache = core.new_cache(1, [1019])
    with LiveBytes() as live:
        generate(core, [prompt], 20, Sampler(), prefill_chunk_size=chunk)
    return {
        "weights": sum(parameter.nbytes for parameter in loaded.model.parameters()),
        "cache": cache.nbytes,
        "peak": live.peak,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_counted_bytes_are_those_allocated(tmp_path, ranks):
    model = replace(WIDE, window_size=64, window_attn_skip_freq=3)
    write(tmp_path, model)
    opened = open_model(models.options(tmp_path), ranks)
    for chunk in (0, 250):
        counted = memory.rank_memory(opened, Work((1000,), 20, chunk))
        found = max(
            run_ranks(ranks, measured, tmp_path, chunk), key=lambda of_rank: of_rank["peak"]
        )
        assert counted.weights == found["weights"]
        assert counted.cache == found["cache"]
        peak = counted.cache + max(counted.activations, counted.logits)
        assert found["peak"] == pytest.approx(peak, rel=0.25), (chunk, counted, found)


def opened_with(folder: Path, ranks: int, **changes) -> OpenedModel:
    return open_model(models.options(folder, **changes), ranks)


def test_a_ring_divides_the_cache_and_a_window_bounds_it(tmp_path):
    write(tmp_path / "full", WIDE)
    write(tmp_path / "window", replace(WIDE, window_size=64))
    work = Work((2000,), 1)
    one, four = (
        memory.rank_memory(opened_with(tmp_path / "full", ranks), work) for ranks in (1, 4)
    )
    assert one.cache == 4 * four.cache == 3 * 2 * 2000 * 2 * 32 * 4
    assert one.weights == four.weights
    windowed = memory.rank_memory(opened_with(tmp_path / "window", 1), work)
    longer = memory.rank_memory(opened_with(tmp_path / "window", 1), Work((100_000,), 1))
    assert longer.cache == windowed.cache < one.cache / 10


def test_what_does_not_fit_is_refused_with_what_would(tmp_path):
    opened = opened_with(write(tmp_path, WIDE), 1)
    work = Work((1500,) * 2, 100)
    needed = memory.rank_memory(opened, work).total
    memory.check_fits(opened, work, needed)
    memory.check_fits(opened, work, None)
    with pytest.raises(ConfigError) as raised:
        memory.check_fits(opened, work, needed - 1)
    for flag in ("--max-new-tokens", "--batch-size", "--prefill-chunk-size"):
        assert flag in str(raised.value)
    with pytest.raises(ConfigError, match="no context fits"):
        memory.check_fits(opened, work, 1000)
    with pytest.raises(ConfigError, match=r"a context of ([\d,]+) tokens fits") as raised:
        memory.check_fits(opened, work, needed // 2)
    fits = int(str(raised.value).split("a context of ")[1].split()[0].replace(",", ""))
    assert memory.rank_memory(opened, Work((fits,) * 2, 1)).total <= needed // 2
    assert memory.rank_memory(opened, Work((fits + 1,) * 2, 1)).total > needed // 2


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert memory._left_of_cgroup(tmp_path) == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_of_cgroup(tmp_path) is None
    assert memory._left_of_cgroup(tmp_path / "missing") is None
    host = memory.available_bytes("cpu", 1)
    assert memory.available_bytes("cpu", 4) == pytest.approx(host / 4, rel=0.2)
