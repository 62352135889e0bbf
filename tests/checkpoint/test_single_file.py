"""A file of whole tensors, written from the boxes of a ZeRO 3 grid, is read by safetensors."""

import json
import re
import resource
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_ring.checkpoint import single_file
from megatron_ring.checkpoint.single_file import Entry, consolidate
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError
from tests.checkpoint import imagined

CONFIG = Config(model=ModelConfig(num_layers=2, rope_scaling="yarn", rope_scaling_factor=4.0))


@pytest.fixture(params=[3, 2**20], autouse=True)
def chunk(request, monkeypatch):
    """Use chunks so small that every tensor here has several, and the real ones."""
    monkeypatch.setattr(single_file, "_CHUNK", request.param)


def written(folder: Path, whole: dict[str, torch.Tensor], kind: str = "weight") -> Summary:
    kinds = {"weight": imagined.weights(9)} | {kind: whole}
    return Summary.of(imagined.write(folder, 5, kinds, CONFIG))


def contents(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return {name: opened.get_tensor(name) for name in names}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_file_has_the_whole_tensors(tmp_path, kind, dtype):
    whole = imagined.weights(1)
    file = tmp_path / "a.safetensors"
    size = consolidate(written(tmp_path, whole, kind), file, kind, dtype)
    read_back = contents(file)
    assert read_back.keys() == whole.keys()
    assert all(
        same(read_back[name], values.to(dtype or torch.float32)) for name, values in whole.items()
    )
    assert size == file.stat().st_size


def test_tensors_of_several_dtypes_are_aligned_to_their_element_size(tmp_path):
    """A bfloat16 tensor of an odd number of elements must not come before one of float32."""
    whole = imagined.weights(1)
    whole["a.bias"] = torch.arange(5).bfloat16()
    file = tmp_path / "a.safetensors"
    consolidate(written(tmp_path, whole), file, "weight", None)
    assert all(same(contents(file)[name], values) for name, values in whole.items())
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    starts = [
        (entry["dtype"], entry["data_offsets"][0])
        for name, entry in header.items()
        if name in whole
    ]
    assert length % 8 == 0
    assert all(start % {"F32": 4, "BF16": 2}[code] == 0 for code, start in starts)


def test_the_metadata_has_the_model_and_the_step(tmp_path):
    file = tmp_path / "a.safetensors"
    consolidate(written(tmp_path, imagined.weights()), file, "weight", None)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("model")) == asdict(CONFIG.model)
    assert metadata == {
        "format": "pt",
        "kind": "weight",
        "step": "5",
        "vocab_size": "7",
        "seq_length": "16",
    }


def test_scalars_and_non_ascii_names_are_written(tmp_path):
    values = {"größe": torch.tensor(3.5), "β": torch.ones(2, 1, 3, dtype=torch.float64)}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()]
    single_file.write(
        tmp_path / "a.safetensors", entries, lambda entry: values[entry.name], {"format": "pt"}
    )
    read_back = contents(tmp_path / "a.safetensors")
    assert all(same(read_back[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 7e4), (torch.bfloat16, 3.4e38)])
def test_a_value_too_large_for_the_dtype_is_refused_and_no_file_is_left(tmp_path, dtype, large):
    whole = imagined.weights()
    whole["norm.weight"][2] = -large
    expected = f"norm.weight .*{re.escape(f'{large:.4g}')}.*{str(dtype)[6:]}.*--dtype"
    with pytest.raises(CheckpointError, match=expected):
        consolidate(written(tmp_path / "a", whole), tmp_path / "b.safetensors", "weight", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_non_finite_values_are_written_unchanged(tmp_path):
    whole = imagined.weights()
    whole["norm.weight"][2] = torch.inf
    with imagined.unchecked():
        checkpoint = written(tmp_path, whole)
    consolidate(checkpoint, tmp_path / "a.safetensors", "weight", torch.float16)
    assert contents(tmp_path / "a.safetensors")["norm.weight"].isinf().tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_a_kind_that_is_not_stored_is_refused(tmp_path):
    checkpoint = written(tmp_path, imagined.weights())
    with pytest.raises(CheckpointError, match="exp_avg .*weight.*--kind"):
        consolidate(checkpoint, tmp_path / "a.safetensors", "exp_avg", None)


def test_a_full_disk_leaves_no_file(tmp_path):
    checkpoint = written(tmp_path / "a", imagined.weights())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(
            CheckpointError, match="b.safetensors cannot be written: File too large"
        ):
            consolidate(checkpoint, tmp_path / "b.safetensors", "weight", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
