"""Old checkpoints go once a newer one is whole and the latest, and a killed removal hides what it leaves."""

import shutil
from pathlib import Path

import pytest

from megatron_ring.checkpoint import retention, store
from megatron_ring.config import CheckpointConfig, Config
from tests.checkpoint.small import write


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
def test_what_is_kept(tmp_path, options, kept):
    for step in range(10, 80, 10):
        write(tmp_path, step, keeping(**options))
    assert steps(tmp_path) == kept
    assert not list(tmp_path.glob(".*")), "no leftovers"


def test_steps_of_an_earlier_run_neither_count_nor_go(tmp_path):
    for step in (10, 90, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 40, keeping(keep_last=2))
    assert steps(tmp_path) == [30, 40, 90]
    assert store.newest(tmp_path).state.step == 40


def test_nothing_goes_before_the_new_one_is_whole_and_the_latest(tmp_path, monkeypatch):
    for step in (10, 20):
        write(tmp_path, step)
    seen = []

    def look(folder: Path, newest: int, _: CheckpointConfig) -> None:
        seen.append((store.newest(folder).state.step, newest, steps(folder)))

    monkeypatch.setattr(retention, "remove_outdated", look)
    write(tmp_path, 30, keeping(keep_last=1))
    assert seen == [(30, 30, [10, 20, 30])]


def test_a_removal_that_ends_half_way_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        write(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: [file.unlink() for file in path.glob("rank-*")])
        write(tmp_path, 30, keeping(keep_last=1))
    assert steps(tmp_path) == [30]
    write(tmp_path, 40, keeping(keep_last=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000030", "step-00000040"]
