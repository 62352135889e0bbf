"""An export is refused with the reasons, or written completely."""

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


def refusal(source: Path, out: Path, options: ExportOptions) -> str:
    """Return the error of an export, after checking that it has left no files."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError) as refused:
        export_checkpoint(source, out, options)
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
            "10.666666666666666 tokens (seq_length 32 / rope_scaling_factor 3.0)",
        ),
    ],
)
def test_a_model_that_a_family_cannot_express_is_refused(model, family, reason, tmp_path):
    write(tmp_path / "ours", model)
    assert reason in refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions(family=family))


def test_a_model_that_no_family_can_express_is_refused_with_the_reason_for_each(tmp_path):
    write(tmp_path / "ours", replace(LLAMA, softmax_type="learnable"))
    message = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
        assert f"as {family}: softmax_type is learnable" in message


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
def test_the_default_family_is_the_first_that_describes_the_model_exactly(model, family, tmp_path):
    write(tmp_path / "ours", model)
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert exported.family == family


def test_the_reason_names_every_family_that_can_express_the_model(tmp_path):
    write(tmp_path / "ours", LLAMA)
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert "llama, mistral" in exported.reason


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    write(tmp_path / "ours", QWEN2, value=1e5)
    message = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions(dtype="fp16"))
    for part in ("1e+05", "float16", "6.55e+04", "--dtype"):
        assert part in message


def test_only_a_new_or_empty_folder_is_written(tmp_path):
    write(tmp_path / "ours", QWEN2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes").touch()
    message = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert "theirs already exists" in message
    (tmp_path / "theirs/notes").unlink()
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert exported.family == "qwen2"


def test_a_checkpoint_without_a_tensor_of_its_model_is_refused(tmp_path):
    untied = replace(QWEN2, untie_embeddings_and_output_weights=True)
    write(tmp_path / "ours", untied, left_out="output.weight")
    message = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    for part in ("output.weight", "missing", "(48, 32)"):
        assert part in message


def test_a_damaged_checkpoint_is_refused(tmp_path):
    part = write(tmp_path / "ours", QWEN2) / tensors.part_name(0)
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert "part-00000.safetensors has other bytes" in refusal(
        tmp_path / "ours", tmp_path / "theirs", ExportOptions()
    )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    write(tmp_path / "ours", QWEN2)
    message = refusal(tmp_path / "ours", tmp_path / "theirs", ExportOptions(tokenizer=tmp_path))
    assert "has none of tokenizer.json" in message
    assert "--tokenizer" in message


def test_without_a_tokenizer_only_the_model_is_written(tmp_path):
    write(tmp_path / "ours", QWEN2)
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert exported.carried == []
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_shards_are_within_the_limit_and_have_every_tensor(tmp_path):
    write(tmp_path / "ours", GPT2)
    exported = export_checkpoint(
        tmp_path / "ours", tmp_path / "theirs", ExportOptions(max_shard_size="20KB")
    )
    shards = [load_file(path) for path in sorted((tmp_path / "theirs").glob("*.safetensors"))]
    sizes = [[x.nbytes for x in shard.values()] for shard in shards]
    assert all(sum(shard) <= 20_000 or len(shard) == 1 for shard in sizes)
    assert len(shards) > 2
    index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert index["weight_map"].keys() == {name for shard in shards for name in shard}
    assert set(index["weight_map"].values()) < set(exported.files)


def test_dtypes_may_differ_and_every_tensor_is_aligned_to_its_element_size(tmp_path):
    """Queries and keys of two dtypes become a tensor of the wider. 5 bfloat16 are 10 bytes."""
    odd = replace(GPT2, hidden_size=5, num_attention_heads=1)
    write(tmp_path / "queries", odd, narrow="q_proj")
    exported = export_checkpoint(tmp_path / "queries", tmp_path / "wide", ExportOptions())
    assert exported.dtypes == {torch.float32}
    write(tmp_path / "norms", odd, narrow="norm")
    exported = export_checkpoint(tmp_path / "norms", tmp_path / "mixed", ExportOptions())
    assert exported.dtypes == {torch.float32, torch.bfloat16}
    content = (tmp_path / "mixed/model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    sizes = {"F32": 4, "BF16": 2}
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    assert [entry for entry in tensors if entry["data_offsets"][0] % sizes[entry["dtype"]]] == []


@pytest.mark.parametrize(("window", "first"), [(0, 2), (8, 0)])
def test_max_window_layers_is_the_first_layer_with_a_window(window, first, tmp_path):
    """For programs that do not read layer_types."""
    write(tmp_path / "ours", replace(QWEN2, window_size=window))
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions())
    assert json.loads((tmp_path / "theirs/config.json").read_text())["max_window_layers"] == first


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    write(tmp_path / "ours", QWEN2)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="theirs: Not a directory"):
        export_checkpoint(tmp_path / "ours", tmp_path / "file/theirs", ExportOptions())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("20KB", 20_000), ("7", 7)]
)
def test_sizes_are_parsed_in_powers_of_1000(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1GB", "0", "nan", "infGB"])
def test_invalid_sizes_are_refused_with_the_flag(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
