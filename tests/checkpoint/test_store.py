"""A checkpoint is complete or absent; a damaged one is skipped and reported."""

import errno
import os
from pathlib import Path

import pytest

from megatron_ring.checkpoint import names, store
from megatron_ring.checkpoint.state import FileRecord
from megatron_ring.config import Config, ModelConfig, load_yaml
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import state, write


def test_the_newest_complete_checkpoint_is_found_with_its_state(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    stored = store.newest(tmp_path)
    assert (stored.path, stored.state, stored.skipped) == (path, state(10), ())
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert load_yaml(path / "config.yaml") == Config()


def test_the_last_written_checkpoint_is_the_newest_even_if_its_step_is_lower(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    fresh = write(tmp_path, 5)
    assert store.newest(tmp_path).path == fresh


def test_without_latest_the_highest_step_is_the_newest(tmp_path):
    for step in (5, 10):
        path = write(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert store.newest(tmp_path).path == path


def test_a_checkpoint_being_written_is_not_found(tmp_path):
    write(tmp_path, 5)
    store.prepare(tmp_path, 10)
    (tmp_path / names.partial_name(10) / "rank-0.pt").write_bytes(b"half of the wei")
    assert store.newest(tmp_path).state.step == 5


def test_a_discarded_checkpoint_leaves_no_files(tmp_path):
    write(tmp_path, 5)
    store.prepare(tmp_path, 10)
    store.discard(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_writing_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 5, Config(model=ModelConfig(num_layers=3)))
    assert store.newest(tmp_path).path == path
    assert load_yaml(path / "config.yaml").model.num_layers == 3


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert store.newest(tmp_path) is None


# What the report must contain, and the damage.
DAMAGES = {
    "rank-0.pt has 5 bytes, 18 were": lambda path: (path / "rank-0.pt").write_bytes(b"short"),
    "rank-0.pt has other bytes than the 18 ": lambda path: flip(path / "rank-0.pt", 3),
    "rank-0.pt is missing, 18 bytes were": lambda path: (path / "rank-0.pt").unlink(),
    "config.yaml has other bytes than the SIZE ": lambda path: flip(path / "config.yaml", 10),
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "state.json is damaged": lambda path: flip(path / "state.json", 20),
}


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path, fault):
    good = write(tmp_path, 5)
    damaged = write(tmp_path, 10)
    size = (damaged / "config.yaml").stat().st_size
    DAMAGES[fault](damaged)
    stored = store.newest(tmp_path)
    assert stored.path == good
    [reason] = stored.skipped
    assert f"{tmp_path}/step-00000010" in reason
    assert fault.replace("SIZE", str(size)) in reason


@pytest.mark.parametrize(
    "name", [".DS_Store", "notes.txt", ".nfs0000a1", "part-00007.safetensors", "export/config.json"]
)
def test_a_foreign_file_in_a_checkpoint_is_not_damage(tmp_path, name):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("not ours")
    stored = store.newest(tmp_path)
    assert (stored.path, stored.skipped) == (path, ())
    _, files = store.described(path)
    assert store.foreign_files(path, files) == [name]


def test_a_checkpoint_that_the_disk_fails_to_read_is_skipped(tmp_path, monkeypatch):
    good = write(tmp_path, 5)
    unreadable = write(tmp_path, 10)
    read_back = FileRecord.of

    def fails(path: Path) -> FileRecord:
        if path.parent == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_back(path)

    monkeypatch.setattr(FileRecord, "of", fails)
    stored = store.newest(tmp_path)
    assert stored.path == good
    [reason] = stored.skipped
    assert str(unreadable) in reason
    assert "Input/output error" in reason


def test_if_no_checkpoint_is_complete_all_are_reported(tmp_path):
    for step in (5, 10):
        (write(tmp_path, step) / "rank-0.pt").unlink()
    with pytest.raises(CheckpointError) as refused:
        store.newest(tmp_path)
    paths = [problem.split()[0] for problem in refused.value.problems]
    assert paths == [f"{tmp_path}", f"{tmp_path}/step-00000010", f"{tmp_path}/step-00000005"]


def test_the_error_for_a_folder_that_cannot_be_created_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file/folder: Not a directory.*--save"):
        store.prepare(tmp_path / "file" / "folder", 5)


@pytest.mark.parametrize(
    "content",
    ["", "step-00000012", "step-00000001", "step-10", "nonsense\n", "step-00000010/../.."],
)
def test_a_damaged_latest_is_reported_and_loses_no_checkpoint(tmp_path, content):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    (tmp_path / "latest").write_text(content)
    stored = store.newest(tmp_path)
    assert stored.path == path
    [reason] = stored.skipped
    assert f"{tmp_path}/latest" in reason
    assert repr(content.strip()) in reason


def test_if_the_latest_checkpoint_is_gone_the_previous_one_of_the_same_run_is_found(tmp_path):
    write(tmp_path, 20)
    before = write(tmp_path, 5)
    (write(tmp_path, 10)).rename(tmp_path / "elsewhere")
    stored = store.newest(tmp_path)
    assert stored.path == before
    [reason] = stored.skipped
    assert f"{tmp_path}/latest" in reason
    assert "'step-00000010'" in reason


def test_if_all_checkpoints_are_gone_but_latest_remains_it_is_an_error(tmp_path):
    write(tmp_path, 5).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        store.newest(tmp_path)


def test_leftovers_of_killed_saves_are_deleted_by_the_next_save(tmp_path):
    for step in (5, 10):
        store.prepare(tmp_path, step)
        (tmp_path / names.partial_name(step) / "rank-0.pt").write_bytes(b"half of the wei")
    write(tmp_path, 15).rename(tmp_path / ".removed-step-00000015")
    write(tmp_path, 20)
    store.prepare(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".partial-00000025",
        "latest",
        "step-00000020",
    ]


def test_the_only_checkpoint_is_not_deleted_even_if_a_killed_save_has_hidden_it(tmp_path):
    write(tmp_path, 5).rename(tmp_path / ".removed-step-00000005")
    store.prepare(tmp_path, 5)
    assert store.newest(tmp_path).state == state(5)
    store.discard(tmp_path, 5)
    write(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="file: Not a directory.*--load"):
        store.newest(tmp_path / "file")


def test_each_name_is_flushed_after_its_bytes_and_before_what_relies_on_it(tmp_path, monkeypatch):
    """A power cut keeps only what was flushed."""
    log = []
    fsync = os.fsync
    replace = Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (log.append(opened(descriptor)), fsync(descriptor))
    )
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (log.append(f"rename {to.name}"), replace(path, to))
    )
    write(tmp_path / "made", 5)
    assert log == [
        f"flush {tmp_path.name}",
        "flush rank-0.pt",
        "flush config.yaml",
        "flush config.yaml",
        "flush state.json",
        "flush .partial-00000005",
        "rename step-00000005",
        "flush made",
        "flush .latest",
        "rename latest",
        "flush made",
    ]


def opened(descriptor: int) -> str:
    return f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}"
