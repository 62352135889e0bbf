"""The error for a folder without a checkpoint of this project names what the folder holds."""

import pytest

from megatron_ring.checkpoint import foreign_formats
from megatron_ring.errors import CheckpointError

FOREIGN = {
    "Hugging Face": [
        ["config.json", "model.safetensors", "tokenizer.json"],
        ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        ["config.json", "pytorch_model.bin"],
        ["config.json", "model.safetensors", "global_step500/", "latest", "zero_to_fp32.py"],
    ],
    "adapter": [["adapter_config.json", "adapter_model.safetensors"]],
    "DeepSpeed": [["global_step10/", "latest", "zero_to_fp32.py"], ["mp_rank_00_model_states.pt"]],
    "Megatron": [
        ["latest_checkpointed_iteration.txt", "iter_0000001/"],
        ["latest_checkpointed_iteration.txt"],
        ["iter_0000001/"],
        ["mp_rank_00/", "mp_rank_01/"],
        ["mp_rank_00_001/"],
        ["model_optim_rng.pt"],
    ],
    "torch.distributed": [[".metadata", "__0_0.distcp", "common.pt", "metadata.json"]],
    "not whole": [["tensors.json", "part-00000.safetensors", "config.yaml"]],
    "checkpoint.pt": [["checkpoint.pt"]],
    "consolidated.00.pth": [["consolidated.00.pth", "params.json"]],
}


def fill(folder, names):
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()


@pytest.mark.parametrize(
    ("word", "names"), [(word, names) for word, found in FOREIGN.items() for names in found]
)
def test_a_checkpoint_of_another_program_is_named(tmp_path, word, names):
    fill(tmp_path, names)
    with pytest.raises(CheckpointError, match=word) as refused:
        foreign_formats.check_not_foreign(tmp_path)
    assert str(tmp_path) in str(refused.value)
    if word != "not whole":
        assert "convert_checkpoint.py import" in str(refused.value)


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".DS_Store"],
        ["metrics.jsonl", "loss.png", "logs/"],
        ["config.json"],
        ["model.py", "notes.txt"],
    ],
)
def test_a_folder_without_any_checkpoint_is_accepted(tmp_path, names):
    fill(tmp_path, names)
    foreign_formats.check_not_foreign(tmp_path)


def test_a_file_is_refused_with_the_nearest_folder(tmp_path):
    (tmp_path / "latest").write_text("step-00000010")
    with pytest.raises(CheckpointError, match=f"is a file.* Nearest: {tmp_path}"):
        foreign_formats.check_not_foreign(tmp_path / "latest")


def test_files_of_operating_systems_are_not_content(tmp_path):
    fill(tmp_path, [".DS_Store", "._notes", ".nfs00000000051e0b7a00000001", "Thumbs.db", "notes"])
    assert foreign_formats.content(tmp_path) == ["notes"]
    assert foreign_formats.content(tmp_path / "none") == []
