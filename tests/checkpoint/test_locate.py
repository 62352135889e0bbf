"""A checkpoint is found by its own folder or by its --save folder; errors name the folder."""

import pytest

from megatron_ring.checkpoint.locate import Located, described, locate, verify
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import write


def test_the_folder_of_a_checkpoint_is_that_checkpoint(tmp_path):
    path = write(tmp_path, 5)
    write(tmp_path, 10)
    assert locate(path) == Located(path, "")


def test_a_save_folder_is_the_checkpoint_that_latest_names(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
    latest = write(tmp_path, 7)
    located = locate(tmp_path)
    assert located.path == latest
    assert f"{tmp_path}" in located.note
    assert "step-00000007" in located.note


def test_a_damaged_latest_is_reported(tmp_path):
    path = write(tmp_path, 5)
    (tmp_path / "latest").write_text("step-00000099")
    located = locate(tmp_path)
    assert located.path == path
    assert "step-00000099" in located.note


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{folder} .*state\.json.*--save"):
            locate(folder)


def test_a_damaged_checkpoint_is_named_with_the_file(tmp_path):
    path = write(tmp_path, 5)
    verify(path)
    file = next(file for file in sorted(path.iterdir()) if file.suffix not in (".json", ".yaml"))
    file.write_bytes(b"other")
    with pytest.raises(
        CheckpointError,
        match=rf"{path} .*{file.name} has 5 bytes, .* were written\.",
    ):
        verify(path)
    (path / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=rf"{path} .*state\.json is damaged"):
        described(path)
