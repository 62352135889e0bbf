"""A model is loaded from checkpoints of any grid and from Hugging Face folders, or refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ring.config import DataConfig
from megatron_ring.data.manifest import Manifest, write_manifest
from megatron_ring.data.store_fingerprint import manifest_sha256
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.inference.loading import load, open_model
from megatron_ring.inference.model_tokenizer import TokenizerSources, store_notes
from tests.checkpoint import hugging_face_models, small
from tests.distributed import run_ranks
from tests.inference import models
from tests.model.conftest import plain_attention
from tests.training import tiny

TOKENS = torch.arange(10).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2 in ``runs``; the second is that of ``random_model``."""
    folder = tmp_path_factory.mktemp("models")
    first = models.random_model()
    with torch.no_grad():
        first.embedding.weight.zero_()
    models.write_checkpoint(folder / "runs", first, step=1)
    models.write_checkpoint(folder / "runs", models.random_model(), step=2)
    for name in ("llama tied", "gpt2", "qwen3"):
        hugging_face_models.save(hugging_face_models.CASES[name], folder / name)
    return folder


def loaded_by_rank(rank: int, world_size: int, folder: Path) -> dict:
    environment = models.environment(rank, world_size)
    found = {}
    for tensor in (1, 2):
        options = models.options(folder / "runs", tensor_model_parallel_size=tensor)
        loaded = load(options, environment)
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        found[tensor] = {
            name: parameter.clone() for name, parameter in loaded.model.named_parameters()
        }
        found["grid", tensor] = loaded.grid
        found["source"] = loaded.source.name
    gpt2 = load(models.options(folder / "gpt2", tensor_model_parallel_size=2), environment)
    found["gpt2"] = dict(gpt2.model.named_parameters())
    return found


def test_every_rank_has_its_tensor_part_of_the_newest_checkpoint(folder):
    whole = dict(models.random_model().named_parameters())
    gpt2 = hugging_face_models.build(hugging_face_models.CASES["gpt2"]).state_dict()
    for rank, found in enumerate(run_ranks(2, loaded_by_rank, folder)):
        assert found["source"] == "step-00000002"
        assert found["grid", 1].sizes == (1, 1, 2, 1, 1)
        assert found["grid", 2].sizes == (1, 1, 1, 1, 2)
        assert found[1].keys() == found[2].keys() == whole.keys()
        for name, expected in whole.items():
            assert torch.equal(found[1][name], expected), name
        rows = slice(0, 31) if rank == 0 else slice(31, 61)
        assert torch.equal(found[2]["embedding.weight"], whole["embedding.weight"][rows])
        heads = slice(16 * rank, 16 * (rank + 1))
        query, out = "blocks.1.attention.q_proj.weight", "blocks.1.attention.out_proj.weight"
        assert torch.equal(found[2][query], whole[query][heads])
        assert torch.equal(found[2][out], whole[out][:, heads])
        assert torch.equal(found[2]["final_norm.weight"], whole["final_norm.weight"])
        fused = gpt2["transformer.h.0.attn.c_attn.weight"].T
        keys = fused[32 + 16 * rank : 32 + 16 * (rank + 1)]
        assert torch.equal(found["gpt2"]["blocks.0.attention.k_proj.weight"], keys)


def one_process(rank: int, world_size: int, folder: Path) -> list:
    environment = models.environment(rank, world_size)
    results = []
    for name in ("llama tied", "gpt2", "qwen3"):
        loaded = load(models.options(folder / name), environment)
        for block in loaded.model.blocks.values():
            block.attention.attention = plain_attention
        logits_BSV = loaded.model(TOKENS, torch.arange(TOKENS.shape[1]))
        results.append((name, logits_BSV, loaded.seq_length, loaded.text.ends))
        assert loaded.tokenizer is None
        with pytest.raises(ConfigError, match="--tokenizer-model"):
            loaded.text.required()
    return results


def test_a_hugging_face_folder_is_loaded_without_a_conversion(folder):
    before = sorted(folder.rglob("*"))
    (results,) = run_ranks(1, one_process, folder)
    for name, logits_BSV, seq_length, ends in results:
        expected = hugging_face_models.logits(folder / name, TOKENS)
        torch.testing.assert_close(logits_BSV, expected, rtol=1e-5, atol=1e-5)
        assert seq_length == hugging_face_models.LENGTH
        assert ends == ((2,) if name == "gpt2" else ends)
    assert sorted(folder.rglob("*")) == before


def test_rope_positions_can_be_extended_and_a_learned_table_cannot(folder, tmp_path):
    assert open_model(models.options(folder / "runs"), 1).seq_length == 48
    assert open_model(models.options(folder / "runs", seq_length=500), 1).seq_length == 500
    learned = models.random_model(models.GPT2)
    models.write_checkpoint(tmp_path, learned, models.GPT2)
    assert open_model(models.options(tmp_path, seq_length=20), 1).seq_length == 20
    with pytest.raises(ConfigError, match=r"49 .* 48 .*--seq-length to at most 48"):
        open_model(models.options(tmp_path, seq_length=49), 1)


def test_any_length_fits_every_layout(folder):
    for layout in ("ring", "striped", "zigzag"):
        options = models.options(folder / "runs", context_parallel=layout)
        assert open_model(options, 5).settings.layout.name == layout
    options = models.options(folder / "runs", stripe_size=7)
    assert open_model(options, 3).settings.layout.stripe_size == 7


@pytest.mark.parametrize(
    ("changes", "world_size", "parts"),
    [
        ({"load": ""}, 1, ["--load"]),
        ({"pipeline_model_parallel_size": 2}, 2, ["--pipeline-model-parallel-size 1"]),
        ({"ulysses_degree": 2}, 2, ["--ulysses-degree 1"]),
        ({"context_parallel_size": 2}, 4, ["2 data ranks of 2", "--context-parallel-size 4"]),
        ({"context_parallel": "none"}, 2, ["--context-parallel striped"]),
        ({"tensor_model_parallel_size": 4}, 4, ["num_query_groups 2", "legal: 1, 2"]),
        ({"tensor_model_parallel_size": 3}, 2, ["tensor_model_parallel_size 3"]),
        ({"dtype": "fp16"}, 1, ["--dtype"]),
        ({"prefill_chunk_size": -1}, 1, ["--prefill-chunk-size"]),
        ({"tokenizer_model": "TOKENIZER"}, 1, ["320 ids", "61 rows", "--tokenizer-model"]),
    ],
)
def test_illegal_options_are_one_error(folder, tmp_path, changes, world_size, parts):
    if "tokenizer_model" in changes:
        changes = {"tokenizer_model": str(models.write_tokenizer(tmp_path))}
    options = replace(models.options(folder / "runs"), **changes)
    with pytest.raises(ConfigError) as raised:
        open_model(options, world_size)
    assert len(raised.value.problems) == 1
    assert all(part in str(raised.value) for part in parts), raised.value


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def only_moments(folder: Path) -> Path:
    path = models.write_checkpoint(folder / "moments", models.random_model())
    index = path / "tensors.json"
    index.write_text(index.read_text().replace('"weight"', '"exp_avg"'))
    return path


def without_tensors(folder: Path) -> Path:
    return small.write(folder / "text", 3)


def no_weights_of_transformers(folder: Path) -> Path:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"model_type": "llama"}')
    return folder / "hf"


def parent_of_runs(folder: Path) -> Path:
    small.write(folder / "parent" / "mine", 3)
    return folder / "parent"


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (lambda folder: folder / "missing", ["does not exist", "--load"]),
        (empty_folder, ["neither a checkpoint", "config.json", "--load"]),
        (only_moments, ["no weights", "exp_avg", "--load"]),
        (without_tensors, ["tensors.json"]),
        (no_weights_of_transformers, ["model.safetensors"]),
        (parent_of_runs, ["parent/mine does", "--load"]),
    ],
)
def test_a_folder_without_a_usable_model_is_one_error(tmp_path, write, parts):
    with pytest.raises(CheckpointError) as raised:
        open_model(models.options(write(tmp_path)), 1)
    assert all(part in str(raised.value) for part in parts), raised.value


def damaged(rank: int, world_size: int, path: Path) -> str:
    environment = models.environment(rank, world_size)
    with pytest.raises(CheckpointError) as raised:
        load(models.options(path), environment)
    return str(raised.value)


def test_a_damaged_file_is_found_before_anything_is_loaded(tmp_path):
    path = models.write_checkpoint(tmp_path, models.random_model())
    part = path / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    messages = run_ranks(2, damaged, path)
    assert messages[0] == messages[1]
    assert part.name in messages[0]


def test_the_tokenizer_is_that_of_the_store_and_its_end_that_of_training(tmp_path):
    tokenizer = models.write_tokenizer(tmp_path / "store")
    gpt = models.random_model(vocab_size=models.TOKENIZER_IDS)
    data = DataConfig(seq_length=48, data_path=(str(tmp_path / "store" / "tokens"),))
    models.write_checkpoint(tmp_path / "runs", gpt, data=data, end_of_document=7)
    opened = open_model(models.options(tmp_path / "runs"), 1)
    assert opened.text.required().vocab_size == models.TOKENIZER_IDS
    assert opened.text.ends == (7,)
    tokenizer.unlink()
    opened = open_model(models.options(tmp_path / "runs"), 1)
    with pytest.raises(ConfigError, match=str(tokenizer)):
        opened.text.required()


def test_a_store_that_was_replaced_since_the_run_is_noted_where_it_has_the_tokenizer(tmp_path):
    models.write_tokenizer(tmp_path)
    prefix = str(tmp_path / "tokens")
    write_manifest(prefix, Manifest("t", models.TOKENIZER_IDS, 3, 8, 40))
    trained = [{"prefix": prefix, "manifest_sha256": manifest_sha256(prefix)}]
    run = replace(tiny.config(), data=DataConfig(data_path=(prefix,)))
    sources = TokenizerSources(run=run)
    config = models.options(tmp_path)
    assert store_notes(config, sources, trained) == ()
    write_manifest(prefix, Manifest("u", models.TOKENIZER_IDS, 3, 8, 40))
    [note] = store_notes(config, sources, trained)
    assert prefix in note
    assert "--tokenizer-model" in note
    assert store_notes(replace(config, tokenizer_model="t"), sources, trained) == ()
    assert store_notes(config, sources, []) == ()
