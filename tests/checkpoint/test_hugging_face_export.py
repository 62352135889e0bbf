"""What an export refuses, with the reasons; what it writes, whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ring.checkpoint import tensors
from megatron_ring.checkpoint.hugging_face.exporting import (
    ExportOptions,
    export_checkpoint,
    parse_size,
)
from megatron_ring.config import ModelConfig
from megatron_ring.errors import CheckpointError, ConfigError
from tests.checkpoint.constant_weights import write

LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2)
QWEN2 = replace(LLAMA, add_qkv_bias=True)
GPT2 = replace(
    LLAMA,
    num_query_groups=0,
    normalization="LayerNorm",
    activation="gelu",
    add_bias_linear=True,
    position_embedding_type="learned_absolute",
)


def refusal(source: Path, out: Path, form: ExportOptions) -> str:
    """What an export says, which must leave nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError) as refused:
        export_checkpoint(source, out, form)
    assert sorted(out.parent.iterdir()) == before
    return str(refused.value)


@pytest.mark.parametrize(
    ("model", "family", "reason"),
    [
        (QWEN2, "llama", "as llama: add_qkv_bias is True, and can only be False."),
        (LLAMA, "qwen2", "as qwen2: add_qkv_bias is False, and can only be True."),
        (
            replace(LLAMA, qk_layernorm=True),
            "mistral",
            "as mistral: qk_layernorm is True, and can only be False.",
        ),
        (
            replace(QWEN2, softmax_type="learnable"),
            "qwen2",
            "softmax_type is learnable, and can only be vanilla.",
        ),
        (
            replace(QWEN2, softmax_type="off-by-one"),
            "qwen2",
            "softmax_type is off-by-one, and can only be vanilla.",
        ),
        (
            replace(LLAMA, window_size=8),
            "llama",
            "as llama: window by layer is [8, 8], and can only be [0, 0].",
        ),
        (
            replace(LLAMA, window_size=8, window_attn_skip_freq=2),
            "mistral",
            "as mistral: window by layer is [8, 0], and can only be [8, 8].",
        ),
        (
            replace(LLAMA, num_attention_heads=3, num_query_groups=3, kv_channels=8),
            "llama",
            "32 does not divide into",
        ),
        (
            replace(LLAMA, normalization="LayerNorm"),
            "llama",
            "normalization is LayerNorm, and can only be RMSNorm.",
        ),
        (replace(GPT2, num_query_groups=2), "gpt2", "num_query_groups is 2, and can only be 4."),
        (replace(GPT2, kv_channels=16), "gpt2", "kv_channels is 16, and can only be 8."),
        (
            replace(LLAMA, rope_scaling="yarn", rope_scaling_factor=3.0),
            "llama",
            "RoPE was stretched from 10.666666666666666 tokens",
        ),
    ],
)
def test_a_model_that_a_family_cannot_express(model, family, reason, tmp_path):
    write(tmp_path / "ours", model)
    assert reason in refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions(family=family))


def test_a_model_that_no_family_can_express_is_refused_for_each(tmp_path):
    write(tmp_path / "ours", replace(LLAMA, softmax_type="learnable"))
    told = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
        assert f"as {family}: softmax_type is learnable" in told


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (ModelConfig(), "llama"),
        (LLAMA, "llama"),
        (replace(LLAMA, add_bias_linear=True), "llama"),
        (replace(LLAMA, window_size=8), "mistral"),
        (QWEN2, "qwen2"),
        (replace(LLAMA, qk_layernorm=True), "qwen3"),
        (GPT2, "gpt2"),
    ],
)
def test_without_a_family_the_first_that_describes_the_model_exactly(model, family, tmp_path):
    write(tmp_path / "ours", model)
    assert (
        export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions()).family == family
    )


def test_every_family_that_is_able_is_named(tmp_path):
    write(tmp_path / "ours", LLAMA)
    assert (
        "llama, mistral"
        in export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions()).reason
    )


def test_values_that_the_type_does_not_have(tmp_path):
    write(tmp_path / "ours", QWEN2, value=1e5)
    told = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions(dtype="fp16"))
    assert "has values up to 1e+05, and float16 ends at 6.55e+04. Set --dtype." in told


def test_a_folder_that_holds_something(tmp_path):
    write(tmp_path / "ours", QWEN2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes").touch()
    assert "theirs is there already" in refusal(
        tmp_path / "ours", tmp_path / "theirs", ExportOptions()
    )
    (tmp_path / "theirs/notes").unlink()
    assert (
        export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions()).family == "qwen2"
    )


def test_a_checkpoint_without_a_tensor_that_its_config_asks_for(tmp_path):
    untied = replace(QWEN2, untie_embeddings_and_output_weights=True)
    write(tmp_path / "ours", untied, left_out="output.weight")
    told = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert "output.weight is missing there, (48, 32) here" in told


def test_a_damaged_checkpoint(tmp_path):
    part = write(tmp_path / "ours", QWEN2) / tensors.part_name(0)
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert "part-00000.safetensors has other bytes" in refusal(
        tmp_path / "ours", tmp_path / "theirs", ExportOptions()
    )


def test_a_tokenizer_that_is_none(tmp_path):
    write(tmp_path / "ours", QWEN2)
    told = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions(tokenizer=tmp_path))
    assert "has none of tokenizer.json" in told
    assert "Set --tokenizer" in told


def test_without_a_tokenizer_none_is_written(tmp_path):
    write(tmp_path / "ours", QWEN2)
    done = export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert done.carried == []
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_shards_are_as_large_as_was_asked_and_have_every_tensor(tmp_path):
    write(tmp_path / "ours", GPT2)
    done = export_checkpoint(
        tmp_path / "ours", tmp_path / "theirs", ExportOptions(max_shard_size="20KB")
    )
    shards = [load_file(path) for path in sorted((tmp_path / "theirs").glob("*.safetensors"))]
    sizes = [[x.nbytes for x in shard.values()] for shard in shards]
    assert all(sum(shard) <= 20_000 or len(shard) == 1 for shard in sizes)
    assert len(shards) > 2
    index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert index["weight_map"].keys() == {name for shard in shards for name in shard}
    assert set(index["weight_map"].values()) < set(done.files)


def test_types_may_differ_and_every_tensor_begins_at_a_multiple_of_its_elements_size(tmp_path):
    """Queries and keys, of two types, become one tensor, of the wider. Five bfloat16 are ten bytes."""
    odd = replace(GPT2, hidden_size=5, num_attention_heads=1)
    write(tmp_path / "queries", odd, narrow="q_proj")
    done = export_checkpoint(tmp_path / "queries", tmp_path / "wide", ExportOptions())
    assert done.dtypes == {torch.float32}
    write(tmp_path / "norms", odd, narrow="norm")
    done = export_checkpoint(tmp_path / "norms", tmp_path / "mixed", ExportOptions())
    assert done.dtypes == {torch.float32, torch.bfloat16}
    content = (tmp_path / "mixed/model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    sizes = {"F32": 4, "BF16": 2}
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    assert [entry for entry in tensors if entry["data_offsets"][0] % sizes[entry["dtype"]]] == []


@pytest.mark.parametrize(("window", "first"), [(0, 2), (8, 0)])
def test_readers_that_know_no_layer_types_find_the_first_layer_with_a_window(
    window, first, tmp_path
):
    write(tmp_path / "ours", replace(QWEN2, window_size=window))
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert json.loads((tmp_path / "theirs/config.json").read_text())["max_window_layers"] == first


def test_a_place_that_cannot_be_written_to(tmp_path):
    write(tmp_path / "ours", QWEN2)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write .*theirs: Not a directory"):
        export_checkpoint(tmp_path / "ours", tmp_path / "file/theirs", ExportOptions())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("20KB", 20_000), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1GB", "0", "nan", "infGB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="Set --max-shard-size"):
        parse_size(text)
