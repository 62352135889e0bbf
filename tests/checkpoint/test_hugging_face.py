"""Models imported and exported again have equal logits, tensors and configs, in every family."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron_ring.checkpoint import store
from megatron_ring.checkpoint.hugging_face.exporting import ExportOptions, export_checkpoint
from megatron_ring.checkpoint.hugging_face.families import FAMILIES, read_model, resolved
from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.model.gpt import GPT
from megatron_ring.model.shapes import parameter_shapes
from tests.checkpoint.hugging_face_models import (
    CASES,
    LENGTH,
    VOCABULARY,
    Case,
    config,
    logits,
    our_logits,
    save,
    tensors,
)  # fmt: skip
from tests.model.conftest import CONFIGS, plain_attention


def imported(folder: Path, out: Path, stretch: Stretch | None = None) -> Summary:
    return Summary.of(import_folder(folder, out, stretch or Stretch()).path)


def assert_same_tensors(first: Path, second: Path) -> None:
    expected = tensors(first)
    found = tensors(second)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert {name: x.dtype for name, x in found.items()} == {
        name: x.dtype for name, x in expected.items()
    }


@pytest.fixture
def tokens_BS() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_imported_and_exported_model_is_the_same(case, tmp_path, tokens_BS):
    theirs = save(case, tmp_path / "theirs")
    ours = imported(theirs, tmp_path / "ours")
    expected = logits(theirs, tokens_BS)
    torch.testing.assert_close(our_logits(ours, tokens_BS), expected, rtol=1e-5, atol=1e-5)

    exported = export_checkpoint(
        tmp_path / "ours", tmp_path / "back", ExportOptions(max_shard_size="20KB")
    )
    assert exported.family == case.family
    assert_same_tensors(theirs, tmp_path / "back")
    assert config(tmp_path / "back") == config(theirs)
    assert torch.equal(logits(tmp_path / "back", tokens_BS), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    model = GPT(CONFIGS[name], VOCABULARY, LENGTH, plain_attention)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(CONFIGS[name], VOCABULARY, LENGTH) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(family):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    if family == "gpt2":
        sizes = {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": LENGTH,
        }
    complete = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    model, problems = read_model(FAMILIES[family], sizes)
    expected, no_problems = read_model(FAMILIES[family], complete)
    assert problems == no_problems == []
    assert resolved(model, LENGTH) == resolved(expected, LENGTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_preserved(dtype, tmp_path):
    theirs = save(CASES["gpt2"], tmp_path / "theirs")
    transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=dtype).save_pretrained(
        tmp_path / "narrow"
    )
    ours = imported(tmp_path / "narrow", tmp_path / "ours")
    assert {ours.tensors.dtype(name) for name in ours.tensors.shapes} == {dtype}
    export_checkpoint(tmp_path / "ours", tmp_path / "back", ExportOptions())
    assert_same_tensors(tmp_path / "narrow", tmp_path / "back")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["dtype"] == str(dtype).removeprefix("torch.")


def test_the_dtype_option_converts_the_weights(tmp_path):
    theirs = save(CASES["qwen2"], tmp_path / "theirs")
    imported(theirs, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", ExportOptions(dtype="bf16"))
    expected = tensors(theirs)
    for name, found in tensors(tmp_path / "back").items():
        assert torch.equal(found, expected[name].bfloat16())


def test_a_model_saved_without_its_head_is_imported(tmp_path, tokens_BS):
    """Like the first GPT-2: no prefix in the names, no head, and buffers of the mask."""
    theirs = save(CASES["gpt2"], tmp_path / "theirs")
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs)
    base = {
        name.removeprefix("transformer."): x.contiguous() for name, x in model.state_dict().items()
    }
    del base["lm_head.weight"]
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, LENGTH, LENGTH) for layer in range(2)}
    model.save_pretrained(tmp_path / "base", state_dict=base | masks)
    assert {"h.0.attn.bias", "wte.weight"} <= tensors(tmp_path / "base").keys()
    ours = imported(tmp_path / "base", tmp_path / "ours")
    torch.testing.assert_close(
        our_logits(ours, tokens_BS), logits(theirs, tokens_BS), rtol=1e-5, atol=1e-5
    )


def test_files_beside_the_weights_are_copied_and_checksummed(tmp_path):
    theirs = save(CASES["mistral"], tmp_path / "theirs")
    (theirs / "tokenizer.json").write_text('{"a tokenizer": true}')
    ours = imported(theirs, tmp_path / "ours")
    assert store.verify(ours.path).consumed_samples == 0
    assert (ours.path / "hugging_face/config.json").read_bytes() == (
        theirs / "config.json"
    ).read_bytes()
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "back", ExportOptions())
    assert exported.carried == ["tokenizer.json", "generation_config.json"]
    assert (tmp_path / "back/tokenizer.json").read_text() == '{"a tokenizer": true}'


def test_special_tokens_are_those_of_the_tokenizer_or_none(tmp_path):
    """Not the family's defaults, which are the ids of another model."""
    theirs = save(Case("llama", {"bos_token_id": 7, "eos_token_id": [8, 9]}), tmp_path / "theirs")
    import_folder(theirs, tmp_path / "ours", Stretch())
    export_checkpoint(
        tmp_path / "ours", tmp_path / "back", ExportOptions(family="llama", tokenizer=theirs)
    )
    assert (
        config(tmp_path / "back")["bos_token_id"],
        config(tmp_path / "back")["eos_token_id"],
    ) == (7, [8, 9])
    empty = tmp_path / "tokenizer"
    empty.mkdir()
    (empty / "tokenizer.json").write_text("{}")
    export_checkpoint(
        tmp_path / "ours", tmp_path / "without", ExportOptions(family="llama", tokenizer=empty)
    )
    assert config(tmp_path / "without")["eos_token_id"] is None
