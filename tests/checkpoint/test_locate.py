"""A checkpoint is found by its own folder and by the one it was saved to; a fault names the folder."""

import pytest

from megatron_ring.checkpoint.locate import Located, described, locate, verify
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import write


def test_its_own_folder_is_itself(tmp_path):
    path = write(tmp_path, 5)
    write(tmp_path, 10)
    assert locate(path) == Located(path, "")


def test_the_folder_it_was_saved_to_is_the_one_that_latest_names(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
    latest = write(tmp_path, 7)
    assert locate(tmp_path) == Located(latest, f"{tmp_path}: the latest is step-00000007.")


def test_a_damaged_latest_is_told(tmp_path):
    path = write(tmp_path, 5)
    (tmp_path / "latest").write_text("step-00000099")
    found = locate(tmp_path)
    assert found.path == path
    assert "passed over: it names 'step-00000099'" in found.note


def test_nothing_is_said_to_be_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            CheckpointError,
            match=f"{folder} is no checkpoint, which has a state.json, and holds none",
        ):
            locate(folder)


def test_a_damaged_one_is_named(tmp_path):
    path = write(tmp_path, 5)
    verify(path)
    file = next(file for file in sorted(path.iterdir()) if file.suffix not in (".json", ".yaml"))
    file.write_bytes(b"other")
    with pytest.raises(
        CheckpointError,
        match=rf"{path} is not whole: {file.name} has 5 bytes, .* were written\. Give",
    ):
        verify(path)
    (path / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"{path} is not whole: its state.json is damaged"):
        described(path)
