"""Whatever happens to the files, a run resumes from bytes that were written, or gets an error."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.checkpoint import names, store
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import state

STEPS = (5, 10)
OWN = ("rank-0.pt", "zero/rank-1.pt", "config.yaml", "state.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Write a folder of two checkpoints, each with a file in a sub-folder."""
    folder = tmp_path_factory.mktemp("pristine")
    for step in STEPS:
        store.prepare(folder, step)
        partial = folder / names.partial_name(step)
        (partial / "zero").mkdir()
        for name in OWN[:2]:
            (partial / name).write_bytes(f"weights of step {step} in {name}".encode())
        store.commit(
            folder,
            state(step),
            Config(),
            store.flush_and_checksum(folder, step, store.written(folder, step)),
        )
    return folder


def truncated(file: Path, at: int, _: bytes) -> None:
    os.truncate(file, at % file.stat().st_size)


def flipped(file: Path, at: int, _: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[at // 8 % len(content)] ^= 1 << at % 8
    file.write_bytes(content)


def foreign(file: Path, _: int, content: bytes) -> None:
    file.write_bytes(content)


def appended(file: Path, _: int, content: bytes) -> None:
    file.write_bytes(file.read_bytes() + content + b"!")


def vanished(file: Path, _: int, __: bytes) -> None:
    file.unlink()


def a_folder(file: Path, _: int, __: bytes) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path, _: int, __: bytes) -> None:
    file.unlink()
    os.mkfifo(file)


def a_link_to_itself(file: Path, _: int, __: bytes) -> None:
    file.unlink()
    file.symlink_to(file)


DAMAGES = (truncated, flipped, foreign, appended, vanished, a_folder, a_pipe, a_link_to_itself)
OF_STEP_10 = st.sampled_from([f"step-00000010/{name}" for name in OWN])
ANYWHERE = st.sampled_from(
    ["latest", *(f"step-{step:08d}/{name}" for step in STEPS for name in OWN)]
)
POSITION = st.integers(0, 1 << 20)
CONTENT = st.binary(max_size=300)


def newest_after(pristine: Path, damages: list[tuple[Callable, str, int, bytes]]) -> store.Stored:
    """Return the checkpoint found in a copy after ``damages``, each of another file.

    Checks that the files of that checkpoint are intact.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(pristine, Path(parent, "copy")))
        for damage, file, at, content in damages:
            damage(folder / file, at, content)
        stored = store.newest(folder)
        assert contents(stored.path) == contents(pristine / stored.path.name)
        return stored


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@settings(max_examples=300)
@given(st.sampled_from(DAMAGES), OF_STEP_10, POSITION, CONTENT)
def test_one_damaged_file_makes_a_run_resume_from_the_previous_checkpoint(
    pristine, damage, file, at, content
):
    stored = newest_after(pristine, [(damage, file, at, content)])
    assert stored.state == state(5)
    [reason] = stored.skipped
    assert "step-00000010 is passed over" in reason


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from(DAMAGES), ANYWHERE, POSITION, CONTENT),
        unique_by=lambda damage: damage[1],
    )
)
def test_a_run_resumes_from_the_newest_undamaged_checkpoint_or_gets_an_error(pristine, damages):
    damaged = {file.partition("/")[0] for _, file, _, _ in damages}
    undamaged = [step for step in STEPS if f"step-{step:08d}" not in damaged]
    if undamaged:
        assert newest_after(pristine, damages).state == state(undamaged[-1])
    else:
        with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            newest_after(pristine, damages)


@given(st.lists(st.tuples(st.text("step-.0123456789~a", min_size=1, max_size=16), CONTENT)))
def test_foreign_files_beside_the_checkpoints_are_ignored(pristine, files):
    beside = [
        (foreign, name, 0, content)
        for name, content in files
        if name not in (".", "..", "latest", "step-00000005", "step-00000010")
    ]
    assert newest_after(pristine, beside).state == state(10)


@given(st.lists(st.tuples(st.sampled_from(["", "zero/", "export/", ".git/"]), POSITION, CONTENT)))
def test_files_that_a_checkpoint_does_not_list_are_not_part_of_it(pristine, files):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(pristine, Path(parent, "copy")))
        for inner, at, content in files:
            (folder / "step-00000010" / inner).mkdir(exist_ok=True)
            (folder / "step-00000010" / inner / f"{at}.pt").write_bytes(content)
        stored = store.newest(folder)
        assert (stored.state, stored.skipped) == (state(10), ())
