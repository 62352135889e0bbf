"""Old checkpoints are deleted once a newer one is complete; a kill leaves none half deleted."""

from pathlib import Path

import pytest

from megatron_ring.checkpoint import retention, store
from megatron_ring.checkpoint.state import FileRecord
from megatron_ring.config import CheckpointConfig, Config
from tests.checkpoint.small import state, write


def keeping(**options) -> Config:
    return Config(checkpoint=CheckpointConfig(save="saved", **options))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [10, 20, 30, 40, 50, 60, 70]),
        ({"keep_last": 1}, [70]),
        ({"keep_last": 2}, [60, 70]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50, 60, 70]),
        ({"keep_last": 2, "keep_every": 30}, [30, 60, 70]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 60, 70]),
    ],
)
def test_keep_last_and_keep_every_keep_the_right_steps(tmp_path, options, kept):
    for step in range(10, 80, 10):
        write(tmp_path, step, keeping(**options))
    assert steps(tmp_path) == kept
    assert not list(tmp_path.glob(".*")), "no leftovers"


def test_steps_of_an_earlier_run_are_neither_counted_nor_deleted(tmp_path):
    for step in (10, 90, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 40, keeping(keep_last=2))
    assert steps(tmp_path) == [30, 40, 90]
    assert store.newest(tmp_path).state.step == 40


def test_nothing_is_deleted_before_the_new_checkpoint_is_complete_and_the_latest(
    tmp_path, monkeypatch
):
    for step in (10, 20):
        write(tmp_path, step)
    states = []

    def record(folder: Path, newest: int, *_: object) -> None:
        states.append((store.newest(folder).state.step, newest, steps(folder)))

    monkeypatch.setattr(retention, "remove_outdated", record)
    write(tmp_path, 30, keeping(keep_last=1))
    assert states == [(30, 30, [10, 20, 30])]


def test_an_interrupted_deletion_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        write(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(
            retention, "remove", lambda path: [file.unlink() for file in path.glob("rank-*")]
        )
        write(tmp_path, 30, keeping(keep_last=1))
    assert steps(tmp_path) == [30]
    write(tmp_path, 40, keeping(keep_last=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000030",
        "step-00000040",
    ]


def test_without_retire_nothing_is_deleted(tmp_path):
    for step in (10, 20):
        write(tmp_path, step)
    write(tmp_path, 30, keeping(keep_last=1), delete_outdated=False)
    assert steps(tmp_path) == [10, 20, 30]


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("damage", ["", "state.json", "rank-0.pt"])
def test_files_of_the_user_in_a_checkpoint_are_kept_when_it_is_deleted(tmp_path, damage):
    path = write(tmp_path, 10)
    (path / "export").mkdir()
    (path / "export" / "model.bin").write_text("exported")
    (path / "notes.txt").write_text("the best so far")
    (path / ".DS_Store").write_text("litter")
    if damage:
        (path / damage).write_text("x")
    notes = []
    write(tmp_path, 20, keeping(keep_last=1), note=notes.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kept-from-00000010",
        "latest",
        "step-00000020",
    ]
    kept = content(tmp_path / "kept-from-00000010")
    # Without its record, a file of the checkpoint is kept as well.
    assert kept.pop("rank-0.pt", None) is None or damage == "state.json"
    assert kept == {"export/model.bin": "exported", "notes.txt": "the best so far"}
    assert len(notes) == 1
    assert f"{tmp_path}/kept-from-00000010" in notes[0]
    write(tmp_path, 30, keeping(keep_last=1), note=notes.append)
    assert len(notes) == 1
    assert steps(tmp_path) == [30]


def test_folders_of_kept_files_have_distinct_names(tmp_path):
    for _ in range(2):
        (write(tmp_path, 10) / "notes.txt").write_text("mine")
        write(tmp_path, 20, keeping(keep_last=1))
    assert sorted(path.name for path in tmp_path.glob("kept-*")) == [
        "kept-from-00000010",
        "kept-from-00000010-2",
    ]


def test_a_record_that_lists_files_elsewhere_deletes_none_of_them(tmp_path):
    """Only files in the checkpoint's own folder are deleted, whatever its state.json lists."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "saved"
    store.prepare(folder, 10)
    records = {"link/outside": FileRecord(4, "0" * 64)}
    path = store.commit(folder, state(10), Config(), records)
    (path / "link").symlink_to(tmp_path)
    write(folder, 20, keeping(keep_last=1))
    assert outside.read_text() == "mine"
    assert steps(folder) == [20]


def test_of_a_link_to_a_checkpoint_only_the_link_is_deleted(tmp_path):
    moved = write(tmp_path / "saved", 10).rename(tmp_path / "archived")
    (tmp_path / "saved" / "step-00000010").symlink_to(moved)
    write(tmp_path / "saved", 20, keeping(keep_last=1))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "latest",
        "step-00000020",
    ]
    assert store.verify(moved) == state(10)


def test_a_run_from_step_0_keeps_the_checkpoints_of_an_earlier_run(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save = tmp_path / "save"
    for step in (10, 20):
        write(save, step)
    write(elsewhere, 5)
    (save / "step-00000005").symlink_to("../elsewhere/step-00000005")
    aside = retention.move_earlier_run(save)
    assert aside == save / "earlier-1"
    assert steps(aside) == [5, 10, 20]
    assert steps(save) == []
    assert store.newest(aside).state.step == 20
    assert store.verify(aside / "step-00000005").step == 5
    assert retention.move_earlier_run(save) is None
    write(save, 10)
    assert retention.move_earlier_run(save) == save / "earlier-2"


@pytest.mark.parametrize("renames", range(3))
def test_after_a_kill_between_two_moves_the_newest_is_still_found(tmp_path, monkeypatch, renames):
    for step in (10, 20, 30):
        write(tmp_path, step)
    moves = []

    def rename(path: Path, target: Path) -> None:
        if len(moves) == renames:
            raise KeyboardInterrupt
        moves.append(path.replace(target))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        retention.move_earlier_run(tmp_path)
    assert store.newest(tmp_path).state.step == 30
