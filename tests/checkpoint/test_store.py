"""A checkpoint is whole or not there; what is damaged is passed over and named."""

import errno
import os
from pathlib import Path

import pytest

from megatron_ring.checkpoint import names, store
from megatron_ring.checkpoint.state import FileRecord
from megatron_ring.config import Config, ModelConfig, load_yaml
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import state, write


def test_the_newest_whole_checkpoint_is_found_with_its_state(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    found = store.newest(tmp_path)
    assert (found.path, found.state, found.skipped) == (path, state(10), ())
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert load_yaml(path / "config.yaml") == Config()


def test_a_run_that_starts_afresh_in_the_folder_of_a_longer_one_is_the_newest(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    fresh = write(tmp_path, 5)
    assert store.newest(tmp_path).path == fresh


def test_without_the_pointer_the_last_step_is_the_newest(tmp_path):
    for step in (5, 10):
        path = write(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert store.newest(tmp_path).path == path


def test_one_that_is_being_written_is_not_there_yet(tmp_path):
    write(tmp_path, 5)
    store.prepare(tmp_path, 10)
    (tmp_path / names.partial_name(10) / "rank-0.pt").write_bytes(b"half of the wei")
    assert store.newest(tmp_path).state.step == 5


def test_a_failed_one_leaves_nothing_behind(tmp_path):
    write(tmp_path, 5)
    store.prepare(tmp_path, 10)
    store.discard(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_writing_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 5, Config(model=ModelConfig(num_layers=3)))
    assert store.newest(tmp_path).path == path
    assert load_yaml(path / "config.yaml").model.num_layers == 3


def test_an_empty_folder_holds_none(tmp_path):
    assert store.newest(tmp_path) is None


DAMAGES = {
    "rank-0.pt has 5 bytes, 18 were written": lambda path: (path / "rank-0.pt").write_bytes(
        b"short"
    ),
    "rank-0.pt has other bytes than the 18 that were written": lambda path: flip(
        path / "rank-0.pt", 3
    ),
    "rank-0.pt is missing, 18 bytes were written": lambda path: (path / "rank-0.pt").unlink(),
    "config.yaml has other bytes than the SIZE that were written": lambda path: flip(
        path / "config.yaml", 10
    ),
    "its state.json is missing": lambda path: (path / "state.json").unlink(),
    "its state.json is damaged or of another version": lambda path: flip(path / "state.json", 20),
}


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_one_is_passed_over_and_named(tmp_path, reason):
    good, damaged = write(tmp_path, 5), write(tmp_path, 10)
    size = (damaged / "config.yaml").stat().st_size
    DAMAGES[reason](damaged)
    found = store.newest(tmp_path)
    assert found.path == good
    assert found.skipped == (
        f"{tmp_path}/step-00000010 is passed over: {reason.replace('SIZE', str(size))}.",
    )


@pytest.mark.parametrize(
    "name", [".DS_Store", "notes.txt", ".nfs0000a1", "part-00007.safetensors", "export/config.json"]
)
def test_a_foreign_file_in_a_checkpoint_is_no_damage(tmp_path, name):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("not ours")
    found = store.newest(tmp_path)
    assert (found.path, found.skipped) == (path, ())
    _, files = store.described(path)
    assert store.foreign_files(path, files) == [name]


def test_one_that_the_disk_does_not_give_back_is_passed_over(tmp_path, monkeypatch):
    good, unreadable = write(tmp_path, 5), write(tmp_path, 10)
    read_back = FileRecord.of

    def fails(path: Path) -> FileRecord:
        if path.parent == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_back(path)

    monkeypatch.setattr(FileRecord, "of", fails)
    found = store.newest(tmp_path)
    assert found.path == good
    assert found.skipped == (
        f"{unreadable} is passed over: it cannot be read (Input/output error).",
    )


def test_where_none_is_whole_all_are_named(tmp_path):
    for step in (5, 10):
        (write(tmp_path, step) / "rank-0.pt").unlink()
    with pytest.raises(CheckpointError) as refused:
        store.newest(tmp_path)
    named = [problem.split()[0] for problem in refused.value.problems]
    assert named == [f"{tmp_path}", f"{tmp_path}/step-00000010", f"{tmp_path}/step-00000005"]


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError,
        match="cannot write a checkpoint to .*file/folder: Not a directory. Choose another folder .in a run: --save.",
    ):
        store.prepare(tmp_path / "file" / "folder", 5)


@pytest.mark.parametrize(
    "content",
    ["", "step-00000012", "step-00000001", "step-10", "nonsense\n", "step-00000010/../.."],
)
def test_a_damaged_latest_is_named_and_loses_no_checkpoint(tmp_path, content):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    (tmp_path / "latest").write_text(content)
    found = store.newest(tmp_path)
    assert found.path == path
    assert found.skipped == (
        f"{tmp_path}/latest is passed over: it names {content.strip()!r}, which is not there.",
    )


def test_where_the_latest_has_vanished_the_one_before_is_taken_and_not_one_of_an_earlier_run(
    tmp_path,
):
    write(tmp_path, 20)
    before = write(tmp_path, 5)
    (write(tmp_path, 10)).rename(tmp_path / "elsewhere")
    found = store.newest(tmp_path)
    assert found.path == before
    assert found.skipped == (
        f"{tmp_path}/latest is passed over: it names 'step-00000010', which is not there.",
    )


def test_where_all_have_vanished_a_run_does_not_start_from_nothing(tmp_path):
    write(tmp_path, 5).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        store.newest(tmp_path)


def test_what_killed_saves_left_is_cleared_by_the_next(tmp_path):
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


def test_the_only_one_is_not_cleared_even_where_a_killed_save_had_put_it_aside(tmp_path):
    write(tmp_path, 5).rename(tmp_path / ".removed-step-00000005")
    store.prepare(tmp_path, 5)
    assert store.newest(tmp_path).state == state(5)
    store.discard(tmp_path, 5)
    write(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        CheckpointError, match="cannot read the checkpoints in .*file: Not a directory. Set --load"
    ):
        store.newest(tmp_path / "file")


def test_names_are_flushed_after_what_they_stand_for(tmp_path, monkeypatch):
    """A power cut keeps what was flushed. Each name must be flushed after its bytes, and before what relies on it."""
    log, fsync, replace = [], os.fsync, Path.replace
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
