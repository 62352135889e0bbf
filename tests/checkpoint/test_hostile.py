"""Malicious checkpoints cause an error in bounded time and memory, and no write outside."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.checkpoint import boxes, compatibility, disk, names, retention, store
from megatron_ring.checkpoint.single_file import consolidate
from megatron_ring.checkpoint.state import encode
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.checkpoint.tensors import INDEX, WEIGHT, Tensors
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError
from tests.checkpoint import imagined, small
from tests.limited import limited


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return imagined.write(tmp_path / "saved", 5, {WEIGHT: imagined.weights()})


def seal_again(path: Path) -> None:
    """Rewrite state.json for the files as they are now."""
    state, files = store.described(path)
    (path / store.STATE).write_bytes(
        encode(state, {name: store.FileRecord.of(path / name) for name in files})
    )


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the CheckpointError that a call raises, within limits."""
    with pytest.raises(CheckpointError) as refused:
        limited(call)
    assert len(str(refused.value)) < 20_000
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("training: {lr: 2001-99-99}", "cannot be read"),
        ("model: " + "[" * 60 + "]" * 60, "deep"),
        (f"model: {{num_layers: {10**30}}}", "63"),
        ("model: {num_layers: 100000}", "num_layers"),
        ("model: {hidden_size: wide}", "hidden_size"),
        ("model: {rotary_base: .inf}", "rotary_base"),
        ("model: !!python/object/apply:os.getcwd []", "not YAML"),
        ("- 5", "keys and values"),
        ("x" * (1 << 20), str(1 << 20)),
        ("\n".join(f"key{n}: 1" for n in range(1000)), "and 901 more problems"),
    ],
    ids=["date", "deep", "huge", "layers", "type", "infinite", "tag", "list", "size", "keys"],
)
def test_an_invalid_config_is_a_checkpoint_error_with_its_path(content, reason, checkpoint):
    (checkpoint / store.CONFIG).write_text(content)
    seal_again(checkpoint)
    stored = store.newest(checkpoint.parent)
    for read in (
        lambda: Summary.of(checkpoint),
        lambda: compatibility.check_same_model(stored, Config(), 7),
    ):
        message = refusal(read)
        assert str(checkpoint) in message
        assert reason in message


def change_index(path: Path, changed: Callable[[dict], None]) -> None:
    document = json.loads((path / INDEX).read_text())
    changed(document)
    (path / INDEX).write_text(json.dumps(document))


PART = "part-00000.safetensors"


def entry(shape: object, boxes: object) -> Callable[[dict], None]:
    return lambda document: document["tensors"].update(
        {"norm.weight": {"shape": shape, "boxes": boxes}}
    )


@pytest.mark.parametrize(
    "changed",
    [
        entry([10**30], {f"0:{10**30}": PART}),
        entry([-4], {"0:-4": PART}),
        entry([0], {"0:0": PART}),
        entry([True], {"0:1": PART}),
        entry([4.0], {"0:4": PART}),
        entry([4], {"4:0": PART, "0:8": PART}),
        entry([1] * 9, {",".join(["0:1"] * 9): PART}),
        entry([4], {"0:4": "../../x/part-00000.safetensors"}),
        entry([4], {"0:4": "part-" + "9" * 5000 + ".safetensors"}),
        entry([4], {"0:4": 1}),
        entry([4], {}),
        entry([4], ["0:4"]),
        entry("4", {"0:4": PART}),
        lambda document: document.update(kinds=["weight", "other"]),
        lambda document: document.update(kinds="weight"),
        lambda document: document.update(tensors={}),
        lambda document: document.update(tensors=[1]),
        lambda document: document.pop("kinds"),
    ],
)
def test_an_index_of_other_types_or_ranges_is_refused_with_its_folder(changed, checkpoint):
    change_index(checkpoint, changed)
    message = refusal(lambda: Tensors.open(checkpoint))
    assert str(checkpoint) in message
    assert INDEX in message


def test_a_shape_beyond_all_memory_is_refused_before_anything_is_allocated(checkpoint):
    change_index(checkpoint, entry([10**18], {f"0:{10**18}": PART}))
    assert "norm.weight" in refusal(lambda: Tensors.open(checkpoint).read("norm.weight"))


def test_an_index_of_many_boxes_side_by_side_is_read_in_linear_time():
    """Compared pairwise, the boxes of one row would be 4 * 10^8 pairs."""
    many = [(range(0, 1), range(n, n + 1)) for n in range(20_000)]
    assert limited(lambda: boxes.is_partition(many, (1, 20_000)))
    assert not limited(lambda: boxes.is_partition(many[:-1] + many[:1], (1, 20_000)))


def sparse(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("name", [store.STATE, store.CONFIG, INDEX])
def test_metadata_of_terabytes_is_not_read(name, checkpoint):
    sparse(checkpoint / name)
    assert str(1 << 40) in refusal(lambda: Summary.of(checkpoint))


def test_a_latest_of_terabytes_is_passed_over(checkpoint):
    sparse(checkpoint.parent / names.LATEST)
    assert limited(lambda: store.newest(checkpoint.parent)).path == checkpoint


def test_a_state_of_another_step_than_its_folder_is_refused(checkpoint):
    renamed = checkpoint.rename(checkpoint.with_name("step-00000009"))
    with pytest.raises(CheckpointError, match="step 5, .* step 9"):
        store.newest(checkpoint.parent)
    without_step = renamed.rename(checkpoint.with_name("best"))
    assert Summary.of(without_step).state.step == 5


def test_a_part_that_is_a_pipe_does_not_block(checkpoint):
    (checkpoint / PART).unlink()
    os.mkfifo(checkpoint / PART)
    assert "not a regular file" in refusal(
        lambda: Tensors.open(checkpoint).read("embedding.weight")
    )


def test_a_checkpoint_moved_to_another_disk_and_linked_back_is_complete(checkpoint, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    for file in (PART, INDEX, store.CONFIG):
        (checkpoint / file).rename(archive / file)
        (checkpoint / file).symlink_to(archive / file)
    assert store.newest(checkpoint.parent).path == checkpoint
    checkpoint.rename(archive / "whole")
    checkpoint.symlink_to(archive / "whole")
    assert store.newest(checkpoint.parent).state.step == 5


def test_of_a_linked_checkpoint_only_the_link_is_deleted(checkpoint, tmp_path):
    checkpoint.rename(tmp_path / "archive")
    checkpoint.symlink_to(tmp_path / "archive")
    retention.hide(checkpoint)
    disk.delete(names.removed_path(checkpoint))
    assert list(checkpoint.parent.iterdir()) == [checkpoint.parent / names.LATEST]
    assert (tmp_path / "archive" / store.STATE).is_file()


def test_nothing_is_written_through_links_under_temporary_names(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in (".latest", "latest"):
        (folder / name).symlink_to(secret)
    path = imagined.write(folder, 5, {WEIGHT: imagined.weights()})
    (folder / ".partial-one.safetensors").symlink_to(secret)
    (folder / "one.safetensors").symlink_to(tmp_path / "dangling")
    consolidate(Summary.of(path), folder / "one.safetensors", WEIGHT, None)
    assert secret.read_text() == "secret"
    assert not (tmp_path / "dangling").exists()
    assert not (folder / "latest").is_symlink()
    assert not (folder / "one.safetensors").is_symlink()


def test_a_link_with_the_temporary_name_of_a_new_checkpoint_is_replaced(tmp_path):
    """The files in its target stay."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / names.partial_name(5)).symlink_to(elsewhere)
    small.write(folder, 5)
    assert [file.name for file in elsewhere.iterdir()] == ["precious"]
    assert store.newest(folder).state.step == 5
