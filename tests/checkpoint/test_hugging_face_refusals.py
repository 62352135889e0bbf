"""Unsupported or invalid transformers folders are refused with every reason; nothing is written."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_ring.checkpoint.hugging_face import importing
from megatron_ring.checkpoint.hugging_face.families import (
    FAMILIES,
    read_model,
    unsupported_by_family,
)
from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.stretch import Stretch, stretched
from megatron_ring.config import ModelConfig
from megatron_ring.errors import CheckpointError, ConfigError
from tests.checkpoint.hugging_face_models import CASES, Case, build
from tests.limited import limited

LIKE_LLAMA = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}


def rope(**parameters) -> dict:
    return {"rope_scaling": {"factor": 4.0, **parameters}}


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias False"),
    ("llama", {"mlp_bias": True}, "attention_bias is False and mlp_bias True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and must be 'silu' or 'swish'"),
    ("llama", {"hidden_size": 30}, "hidden_size 30 does not divide into num_attention_heads 4"),
    (
        "llama",
        {"num_key_value_heads": 3},
        "num_query_groups 3 must divide num_attention_heads 4",
    ),
    (
        "llama",
        {"num_hidden_layers": None},
        "num_hidden_layers is None, and must be a whole number above 0",
    ),
    ("llama", {"vocab_size": 0}, "vocab_size is 0, and must be a whole number above 0"),
    (
        "llama",
        {"max_position_embeddings": "32"},
        "max_position_embeddings is '32', and must be a whole",
    ),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', and must be a number"),
    ("llama", {"head_dim": 8.0}, "head_dim is 8.0, and must be a whole number"),
    ("llama", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', and must be an object"),
    ("llama", {"rope_parameters": True}, "rope_parameters is True, and must be an object"),
    ("llama", rope(rope_type=[]), "rope_type is [], which is not supported"),
    (
        "llama",
        rope(rope_type="yarn", factor=1e308),
        "RoPE's factor is 1e+308, and must be at most 2147483647 / 32",
    ),
    ("llama", rope(rope_type="linear", factor=10**400), "and must be at most 2147483647 / 32"),
    ("llama", {"rope_theta": float("inf")}, "rotary_base inf must be a finite number"),
    ("llama", {"intermediate_size": 2**40}, "2147483647"),
    ("qwen3", {"layer_types": 4}, "a value has a type that is invalid for its key"),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        "quantization_config is {'bits': 4}, and must be None",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and must be 1"),
    (
        "llama",
        rope(rope_type="default", partial_rotary_factor=0.25),
        "partial_rotary_factor is 0.25",
    ),
    ("llama", rope(type="dynamic"), "rope_type is 'dynamic', which is not supported"),
    ("llama", rope(rope_type="longrope", long_factor=[1]), "rope_type is 'longrope'"),
    (
        "llama",
        rope(rope_type="linear", factor=0.5),
        "RoPE's factor is 0.5, and must be a number of at least 1",
    ),
    (
        "llama",
        rope(rope_type="llama3", factor=float("nan")),
        "RoPE's factor is nan, and must be a number of at least",
    ),
    (
        "llama",
        rope(rope_type="yarn", original_max_position_embeddings=8.5),
        "original_max_position_embeddings is 8.5",
    ),
    ("llama", rope(rope_type="yarn", beta_fast=16), "RoPE's beta_fast is 16, and must be 32"),
    ("llama", rope(rope_type="yarn", truncate=False), "RoPE's truncate is False, and must be True"),
    ("llama", rope(rope_type="yarn", truncate=None), "RoPE's truncate is None, and must be True"),
    (
        "llama",
        rope(rope_type="yarn", attention_factor=1.0),
        "RoPE's attention_factor is 1.0, and must be 1.138",
    ),
    ("llama", rope(rope_type="yarn", mscale=1.0, mscale_all_dim=0.5), "mscale and mscale_all_dim"),
    (
        "llama",
        rope(rope_type="llama3", high_freq_factor=8.0),
        "RoPE's high_freq_factor is 8.0, and must be 4",
    ),
    (
        "mistral",
        {"sliding_window": 5.0},
        "sliding_window is 5.0, and must be a whole number above 0",
    ),
    (
        "qwen2",
        WINDOW | {"sliding_window": 0},
        "sliding_window is 0, and must be a whole number above 0",
    ),
    (
        "mistral",
        {"layer_types": ["full_attention"] * 4},
        "transformers' Mistral has one window for all layers",
    ),
    (
        "mistral",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
        "must be full_attention for each",
    ),
    (
        "qwen2",
        WINDOW | {"max_window_layers": 2},
        "the layers with a sliding window, 2, 3 of 4, are not supported",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention"] * 3},
        "must be full_attention or sliding_attention for each of",
    ),
    (
        "qwen3",
        {"layer_types": ["chunked_attention"] * 4},
        "must be full_attention or sliding_attention for each of",
    ),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 4},
        "use_sliding_window and sliding_window set no window",
    ),
    ("qwen3", {"attention_bias": True}, "attention_bias is True, and must be False"),
    (
        "gpt2",
        {"activation_function": "relu"},
        "activation_function is 'relu', and must be 'gelu_new'",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scores are scaled by 1 / sqrt(D)"),
    ("gpt2", {"add_cross_attention": True}, "there is no encoder"),
    ("gpt2", {"n_head": 5}, "n_embd 32 does not divide into n_head 5"),
    ("bloom", {}, "Supported: llama, mistral, qwen2, qwen3, gpt2"),
    ("bloom", {}, "Nearest: gpt2"),
    ("bloom", {}, "ALiBi"),
]


KEYS = {key for _, changes, _ in REFUSED for key in changes} | LIKE_LLAMA.keys() | GPT2.keys()
KEYS |= {
    "factor",
    "rope_type",
    "type",
    "rope_theta",
    "rope_parameters",
    "original_max_position_embeddings",
    "head_dim",
}


def write_config(folder: Path, family: str, **changes) -> Path:
    """Write a folder with a changed config.json of the family, and weights that do not match it."""
    folder.mkdir()
    sizes = GPT2 if family == "gpt2" else LIKE_LLAMA
    (folder / "config.json").write_text(json.dumps({"model_type": family} | sizes | changes))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def refusal(source: Path, out: Path) -> str:
    """Return the error of an import, after checking that it has left no checkpoint."""
    with pytest.raises(CheckpointError) as refused:
        import_folder(source, out, Stretch())
    assert not out.exists() or not list(out.iterdir())
    return str(refused.value)


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_an_unsupported_model_is_refused_with_the_reason(family, changes, reason, tmp_path):
    assert reason in refusal(
        write_config(tmp_path / "theirs", family, **changes), tmp_path / "ours"
    )


def test_an_adapter_is_refused(tmp_path):
    folder = write_config(tmp_path / "theirs", "llama")
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(folder, tmp_path / "ours")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.floats()
    | st.text()
    | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(), inner)
    ),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(changes=st.dictionaries(st.sampled_from(sorted(KEYS)), JSON, max_size=4))
def test_a_config_of_any_values_is_read_or_refused(family, changes):
    """Without any other exception; a config that is read can be written."""
    config = (GPT2 if family == "gpt2" else LIKE_LLAMA) | changes
    model, problems = read_model(FAMILIES[family], config)
    if not problems:
        assert unsupported_by_family(FAMILIES[family], model, 32) == []


def test_all_reasons_are_reported_at_once(tmp_path):
    message = refusal(
        write_config(tmp_path / "theirs", "llama", hidden_act="relu", mlp_bias=True),
        tmp_path / "ours",
    )
    assert "hidden_act is 'relu'" in message
    assert "mlp_bias True" in message


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Save a Qwen 2 with tied embeddings in one file."""
    build(Case("qwen2", {"tie_word_embeddings": True})).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors, or remove those given as None."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(
        {name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing."),
        ("model.norm.bias", torch.zeros(32), "model.norm.bias is not a tensor of the model."),
        (
            "model.layers.4.mlp.up_proj.weight",
            torch.zeros(48, 32),
            "mlp.up_proj.weight is not a tensor of the model.",
        ),
        (
            "model.norm.weight",
            torch.zeros(31),
            "model.norm.weight has shape [31], and must have [32].",
        ),
        (
            "model.norm.weight",
            torch.zeros(32, dtype=torch.int8),
            "model.norm.weight has dtype I8, and must have",
        ),
        (
            "lm_head.weight",
            torch.zeros(61, 32),
            "differs from model.embed_tokens.weight, but tie_word_embeddings is true",
        ),
    ],
)
def test_tensors_that_do_not_match_the_model_are_refused(name, tensor, reason, theirs, tmp_path):
    rewrite(theirs, **{name: tensor})
    assert reason in refusal(theirs, tmp_path / "ours")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value, theirs, tmp_path):
    tensor = load_file(theirs / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    tensor[1, 2] = value
    rewrite(theirs, **{"model.layers.0.mlp.up_proj.weight": tensor})
    message = refusal(theirs, tmp_path / "ours")
    assert "model.layers.0.mlp.up_proj.weight in model.safetensors has 1 value" in message


def test_a_second_copy_of_a_tied_head_and_buffers_are_accepted(theirs, tmp_path):
    embedding = load_file(theirs / "model.safetensors")["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(theirs, **{"lm_head.weight": embedding.clone(), **buffer})
    assert import_folder(theirs, tmp_path / "ours", Stretch()).path.is_dir()


def test_a_missing_folder_is_refused(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere", tmp_path / "ours")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not JSON"),
        (b"[" * 10**5, "not JSON"),
    ],
)
def test_a_config_that_is_not_a_json_object_is_refused(content, reason, theirs, tmp_path):
    (theirs / "config.json").write_bytes(content)
    assert reason in refusal(theirs, tmp_path / "ours")


def test_a_missing_config_is_refused(theirs, tmp_path):
    (theirs / "config.json").unlink()
    assert "config.json cannot be read: No such file" in refusal(theirs, tmp_path / "ours")


def test_pickled_weights_are_not_read(theirs, tmp_path):
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    assert "but pytorch_model.bin: only safetensors" in refusal(theirs, tmp_path / "ours")


def test_a_folder_without_weights_is_refused(theirs, tmp_path):
    (theirs / "model.safetensors").unlink()
    message = refusal(theirs, tmp_path / "ours")
    assert "neither model.safetensors nor model.safetensors.index.json. " in message


def indexed(folder: Path, *left_out: str, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Add a file with an index beside model.safetensors, with tensors left out or changed."""
    tensors = {
        name: x
        for name, x in load_file(folder / "model.safetensors").items()
        if name not in left_out
    } | changes
    save_file(tensors, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize(
    "difference", ["a value", "the sign of a zero", "a type", "a shape", "one more", "one less"]
)
def test_a_single_file_beside_an_index_with_other_weights_is_refused(difference, theirs, tmp_path):
    """The single file is what transformers would read, but the other one may be meant."""
    norm = load_file(theirs / "model.safetensors")["model.norm.weight"]
    if difference == "the sign of a zero":
        norm[0] = 0.0
        rewrite(theirs, **{"model.norm.weight": norm})
    other = {
        "a value": norm + 1,
        "the sign of a zero": torch.where(norm == 0, -norm, norm),
        "a type": norm.bfloat16(),
        "a shape": norm[:-1],
        "one more": norm,
        "one less": norm,
    }[difference]
    if difference == "one less":
        indexed(theirs, "model.norm.weight")
    else:
        name = "model.norm.bias" if difference == "one more" else "model.norm.weight"
        indexed(theirs, **{name: other.clone()})
    message = refusal(theirs, tmp_path / "ours")
    assert "model.safetensors.index.json" in message
    assert "model.norm." in message


def test_a_single_file_beside_an_index_with_the_same_weights_is_accepted(theirs, tmp_path):
    indexed(theirs)
    assert import_folder(theirs, tmp_path / "ours", Stretch()).path.is_dir()


@pytest.mark.parametrize("kept", [0, 4, 60, 5000, -1])
def test_a_truncated_file_is_refused(kept, theirs, tmp_path):
    content = (theirs / "model.safetensors").read_bytes()
    (theirs / "model.safetensors").write_bytes(content[:kept])
    assert "model.safetensors cannot be read" in refusal(theirs, tmp_path / "ours")


@pytest.fixture
def sharded(tmp_path) -> Path:
    build(CASES["qwen2"]).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_an_index_of_other_tensors_is_refused(sharded, tmp_path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "do not have the same tensors: model.norm.weight" in refusal(sharded, tmp_path / "ours")


def test_an_invalid_index_is_refused(sharded, tmp_path):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"x": 1}}')
    assert "weight_map" in refusal(sharded, tmp_path / "ours")


def test_an_index_with_a_missing_file_is_refused(sharded, tmp_path):
    next(sharded.glob("model-00002*")).unlink()
    assert "cannot be read" in refusal(sharded, tmp_path / "ours")


def test_an_existing_checkpoint_is_not_replaced(theirs, tmp_path):
    import_folder(theirs, tmp_path / "ours", Stretch())
    with pytest.raises(CheckpointError, match=f"{tmp_path}/ours already exists and has"):
        import_folder(theirs, tmp_path / "ours", Stretch())
    assert (tmp_path / "ours/step-00000000/state.json").is_file()


@pytest.mark.parametrize("folder", ["ours", "ours/step-00000000"])
def test_a_checkpoint_of_this_project_is_not_imported(folder, theirs, tmp_path):
    import_folder(theirs, tmp_path / "ours", Stretch())
    assert f"--load {tmp_path / folder}" in refusal(tmp_path / folder, tmp_path / "out")


@pytest.mark.parametrize("rope", [True, "yarn", {"rope_type": []}, {"rope_type": {"a": 1}}, [1]])
def test_rope_parameters_of_any_type_are_ignored_in_a_model_without_rope(rope, tmp_path):
    build(CASES["gpt2"]).save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert import_folder(tmp_path / "gpt2", tmp_path / "ours", Stretch()).notes == []


def test_an_error_in_the_notes_leaves_no_files(theirs, tmp_path, monkeypatch):
    def fails(*_):
        raise CheckpointError("notes")

    monkeypatch.setattr(importing, "_notes", fails)
    assert refusal(theirs, tmp_path / "ours") == "notes"


@pytest.mark.parametrize(
    ("stretch", "flag"),
    [
        (Stretch(seq_length=2**40), "--seq-length"),
        (Stretch("yarn", seq_length=2**40), "--seq-length"),
        (Stretch("linear", seq_length=10**400), "--seq-length"),
        (Stretch("linear", rope_scaling_factor=1e308), "--rope-scaling-factor"),
        (Stretch("ntk", rope_scaling_factor=float("inf")), "--rope-scaling-factor"),
        (Stretch("yarn", rope_scaling_factor=float("nan")), "--rope-scaling-factor"),
    ],
)
def test_a_length_beyond_the_longest_sequence_is_refused(stretch, flag, theirs, tmp_path):
    with pytest.raises(ConfigError, match="2147483647") as refused:
        import_folder(theirs, tmp_path / "ours", stretch)
    assert flag in str(refused.value)
    assert not (tmp_path / "ours").exists()


def test_a_config_that_a_run_refuses_is_not_written(theirs, tmp_path, monkeypatch):
    wrong = ModelConfig(rope_scaling_factor=2.0)
    monkeypatch.setattr(importing, "stretched", lambda model, *_: (wrong, 32))
    with pytest.raises(ConfigError, match=r"rope_scaling_factor 2\.0"):
        import_folder(theirs, tmp_path / "ours", Stretch())
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("step", ["write_whole", "_carry"])
def test_a_full_disk_leaves_no_files(step, theirs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(importing, step, full)
    message = refusal(theirs, tmp_path / "ours")
    assert f"{tmp_path}/ours" in message
    assert "No space left on device" in message


def test_leftovers_of_a_killed_import_are_deleted(theirs, tmp_path):
    import_folder(theirs, tmp_path / "whole", Stretch())
    shutil.copytree(tmp_path / "whole/step-00000000", tmp_path / "ours/.partial-00000000")
    import_folder(theirs, tmp_path / "ours", Stretch())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "latest",
        "step-00000000",
    ]


# ---- malicious input ----


def move_weights_out(folder: Path) -> Path:
    """Move the weights beside the folder, and return their path."""
    return (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "{}", ".", "", "a\0b", "model.safetensors/../../x"]
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(name, theirs, tmp_path):
    names = load_file(theirs / "model.safetensors")
    outside = move_weights_out(theirs)
    index = {"weight_map": dict.fromkeys(names, name.format(outside))}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not the name of a file inside the folder" in refusal(theirs, tmp_path / "ours")


OF_A_FOLDER = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "generation_config.json",
    "merges.txt",
]


@pytest.mark.parametrize("name", OF_A_FOLDER)
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(name, theirs, tmp_path):
    secret = tmp_path / "secret"
    if (theirs / name).exists():
        (theirs / name).rename(secret)
    else:
        secret.write_text("{}")
    (theirs / name).symlink_to(secret)
    assert f"{name} is a link to {secret}" in refusal(theirs, tmp_path / "ours")


@pytest.mark.parametrize("name", OF_A_FOLDER)
def test_a_pipe_is_refused_without_blocking(name, theirs, tmp_path):
    (theirs / name).unlink(missing_ok=True)
    os.mkfifo(theirs / name)
    assert f"{name} cannot be read: it is not a regular file" in limited(
        lambda: refusal(theirs, tmp_path / "ours")
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_sparse_file_of_terabytes_is_refused(name, theirs, tmp_path):
    with (theirs / name).open("wb") as file:
        file.truncate(1 << 40)
    assert str(1 << 40) in limited(lambda: refusal(theirs, tmp_path / "ours"))


def test_a_snapshot_in_the_hubs_cache_may_link_to_its_blobs(theirs, tmp_path):
    snapshot = tmp_path / "cache/snapshots/0123"
    blobs = tmp_path / "cache/blobs"
    snapshot.mkdir(parents=True)
    theirs.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    assert import_folder(snapshot, tmp_path / "ours", Stretch()).path.is_dir()


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("qwen2", WINDOW | {"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ("qwen3", {"num_hidden_layers": 2**16}, "describes 65536 layers"),
        (
            "qwen2",
            WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 5000},
            "layer_types",
        ),
        ("gpt2", {"n_layer": 10**9}, "n_layer"),
        ("gpt2", {"n_layer": 2**16}, "describes 65536 layers"),
        ("llama", {"max_position_embeddings": 10**30}, "max_position_embeddings"),
        ("llama", {"vocab_size": 2**31}, "vocab_size"),
        ("llama", {"head_dim": 10**30}, "kv_channels"),
        ("llama", {"rope_theta": float("inf")}, "rotary_base"),
        ("llama", {"rope_theta": -1.0}, "rotary_base"),
        ("llama", {"rms_norm_eps": float("inf")}, "norm_epsilon"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("llama", {"attention_bias": 1, "mlp_bias": 1}, "attention_bias"),
        ("qwen2", {"use_sliding_window": [0]}, "use_sliding_window"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"model_type": {"llama": 1}}, "model_type"),
        ("llama", {"quantization_config": ["x" * 10**6] * 20}, "quantization_config"),
    ],
)
def test_values_that_would_take_unbounded_time_or_memory_are_refused(
    family, changes, key, tmp_path
):
    source = write_config(tmp_path / "theirs", family, **changes)
    message = limited(lambda: refusal(source, tmp_path / "ours"))
    assert key in message
    assert len(message) < 2000


@settings(max_examples=30)
@given(value=JSON)
def test_an_original_length_of_any_type_is_valid_or_a_config_error(value):
    config = LIKE_LLAMA | {"original_max_position_embeddings": value}
    with contextlib.suppress(ConfigError):
        stretched(ModelConfig(), config, 32, Stretch(rope_scaling="yarn", seq_length=64))


@pytest.mark.parametrize("content", [b"[" * 10, b"[]", b"{", b'{"a":' * 5000])
def test_settings_that_are_not_json_are_refused(content, theirs, tmp_path):
    (theirs / "generation_config.json").write_bytes(content)
    assert "generation_config.json cannot be read" in refusal(theirs, tmp_path / "ours")
