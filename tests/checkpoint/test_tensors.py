"""Tensors written in any boxes are read back in any others; invalid files are a CheckpointError."""

import json
import math
import tempfile
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_ring.checkpoint import boxes, tensors
from megatron_ring.checkpoint.tensors import INDEX, WEIGHT, Piece, Tensors
from megatron_ring.errors import CheckpointError
from tests.checkpoint import imagined

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)
TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of distinct elements that are exact in every dtype."""
    return torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)


FACTORS = {WEIGHT: 1, "exp_avg": -1, "exp_avg_sq": 2}
Held = list[tuple[str, boxes.Box]]


def write(
    folder: Path,
    whole: dict[str, torch.Tensor],
    parts: list[Held],
    kinds: tuple[str, ...] = (WEIGHT,),
) -> None:
    """Write the boxes of each part; a kind's values are those of ``whole`` times its factor."""

    def piece(name: str, box: boxes.Box) -> Piece:
        return Piece(
            name, box, {kind: FACTORS[kind] * whole[name][boxes.slices(box)] for kind in kinds}
        )

    written = [
        tensors.write_part(folder, n, [piece(name, box) for name, box in held])
        for n, held in enumerate(parts)
    ]
    tensors.write_index(folder, {name: tuple(x.shape) for name, x in whole.items()}, kinds, written)


@st.composite
def splits(draw, shape: tuple[int, ...]) -> list[list[boxes.Box]]:
    """Draw ranges of the flattened elements, and return the boxes of each."""
    borders = sorted(
        [0, *draw(st.lists(st.integers(0, math.prod(shape)), max_size=4)), math.prod(shape)]
    )
    return [boxes.cut(shape, start, stop) for start, stop in pairwise(borders)]


@st.composite
def boxes_in(draw, shape: tuple[int, ...]) -> boxes.Box:
    borders = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    return tuple(range(start, max(stop, start + 1)) for start, stop in borders)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tensors_written_in_any_boxes_are_read_back_by_any_box(data):
    shape = data.draw(SHAPES)
    dtype = data.draw(TYPES)
    whole = numbered(shape, dtype)
    split = data.draw(splits(shape))
    box = data.draw(boxes_in(shape))
    with tempfile.TemporaryDirectory() as folder:
        write(
            Path(folder),
            {"p": whole},
            [[("p", one) for one in run] for run in split],
            tuple(FACTORS),
        )
        read = Tensors.open(Path(folder))
        assert (read.shapes, read.kinds) == ({"p": shape}, tuple(FACTORS))
        for kind, factor in FACTORS.items():
            assert same(read.read("p", kind), factor * whole)
            assert same(read.read("p", kind, box), factor * whole[boxes.slices(box)])
        assert read.dtype("p") == dtype


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_a_box_is_read_into_a_tensor_of_another_dtype_and_stride(tmp_path):
    whole = numbered((4, 6))
    write(
        tmp_path,
        {"p": whole},
        [
            [("p", box) for box in boxes.cut((4, 6), 0, 9)],
            [("p", box) for box in boxes.cut((4, 6), 9, 24)],
        ],
    )
    out = torch.zeros(5, 3, dtype=torch.float64).t()
    Tensors.open(tmp_path).read_into(out, "p", WEIGHT, boxes.parse("1:4,0:5"))
    assert torch.equal(out, whole[1:4, 0:5].double())


@pytest.mark.parametrize(
    "held", ["0:2,0:2", "0:2,0:4 0:1,0:4", "0:2,0:2 0:2,0:3", "0:2,0:2 0:2,1:3", "0:2,0:4 2:3,0:4"]
)
def test_an_index_that_misses_an_element_or_has_one_twice_is_not_written(tmp_path, held):
    written = [("p", boxes.parse(box)) for box in held.split()]
    with pytest.raises(CheckpointError, match=r"the boxes of p do not make up its shape \(2, 4\)"):
        tensors.write_index(tmp_path, {"p": (2, 4)}, [WEIGHT], [written])
    assert not (tmp_path / INDEX).exists()


def test_a_box_in_two_parts_is_refused(tmp_path):
    twice = [[("p", boxes.parse("0:2,0:4"))]] * 2
    with pytest.raises(CheckpointError, match=r"tensors.json: two parts have p\[0:2,0:4\]"):
        tensors.write_index(tmp_path, {"p": (2, 4)}, [WEIGHT], twice)


@pytest.mark.parametrize("name", [INDEX, "part-00000.safetensors"])
def test_a_failed_write_is_a_checkpoint_error(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"^{name}: .*[Ii]s a directory"):
        write(tmp_path, {"p": numbered((2,))}, [[("p", boxes.parse("0:2"))]])


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Return the files of a valid checkpoint, and its weights."""
    whole = imagined.weights()
    path = imagined.write(tmp_path_factory.mktemp("good"), 5, {WEIGHT: whole})
    return {file.name: file.read_bytes() for file in path.iterdir()}, whole


def refused_or_right(files: dict[str, bytes], whole: dict[str, torch.Tensor]) -> bool:
    """Return whether reading all tensors raises CheckpointError; otherwise check their values."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            read = Tensors.open(Path(folder))
            found = {name: read.read(name, kind) for name in read.shapes for kind in read.kinds}
        except CheckpointError:
            return True
    assert all(same(values, whole[name]) for name, values in found.items())
    return False


def changed(content: bytes, position: int, value: int) -> bytes:
    return content[:position] + bytes([value]) + content[position + 1 :]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_changed_byte_of_the_index_is_refused_or_changes_no_number(good, data):
    files, whole = good
    position = data.draw(st.integers(0, len(files[INDEX]) - 1))
    value = data.draw(st.integers(0, 255))
    refused_or_right(files | {INDEX: changed(files[INDEX], position, value)}, whole)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_truncated_file_is_refused(good, data):
    files, whole = good
    name = data.draw(st.sampled_from([INDEX, "part-00000.safetensors", "part-00004.safetensors"]))
    # The index ends in "}\n".
    kept = data.draw(st.integers(0, len(files[name]) - 2))
    assert refused_or_right(files | {name: files[name][:kept]}, whole)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_changed_byte_of_a_header_is_refused_or_changes_no_number(good, data):
    files, whole = good
    name = data.draw(st.sampled_from(["part-00000.safetensors", "part-00004.safetensors"]))
    end = 8 + int.from_bytes(files[name][:8], "little")
    position = data.draw(st.integers(0, end - 1))
    value = data.draw(st.integers(0, 255))
    refused_or_right(files | {name: changed(files[name], position, value)}, whole)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["kinds", "0:2"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {"shape": JSON, "boxes": st.dictionaries(st.text(max_size=5), JSON, max_size=2) | JSON}
)
INDICES = JSON | st.fixed_dictionaries(
    {"kinds": JSON, "tensors": st.dictionaries(st.text(), ENTRY, max_size=2) | JSON}
)


@settings(deadline=None, max_examples=150)
@given(INDICES.map(lambda document: json.dumps(document).encode()) | st.binary(max_size=60))
def test_a_random_index_is_refused(good, content):
    files, whole = good
    assert refused_or_right(files | {INDEX: content}, whole)


PART = "part-00000.safetensors"
HUGE = 10**30
FOREIGN = {
    "no tensors": {"kinds": [WEIGHT], "tensors": {}},
    "an unknown kind": {
        "kinds": ["momentum"],
        "tensors": {"p": {"shape": [2], "boxes": {"0:2": PART}}},
    },
    "an empty tensor": {"kinds": [WEIGHT], "tensors": {"p": {"shape": [0], "boxes": {}}}},
    "negative sizes": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [-1, -1], "boxes": {"0:1,0:1": PART}}},
    },
    "a fraction": {"kinds": [WEIGHT], "tensors": {"p": {"shape": [2.0], "boxes": {"0:2": PART}}}},
    "a size of more than 64 bits": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [HUGE], "boxes": {f"0:{HUGE}": PART}}},
    },
    "more than fits in memory": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [2**50], "boxes": {f"0:{2**50}": PART}}},
    },
    "a box in other dimensions": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [2], "boxes": {"0:2,0:1": PART}}},
    },
    "a file elsewhere": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [2], "boxes": {"0:2": f"../{PART}"}}},
    },
    "a file that is a number": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [2], "boxes": {"0:2": 0}}},
    },
    "a file that is not there": {
        "kinds": [WEIGHT],
        "tensors": {"p": {"shape": [2], "boxes": {"0:2": PART[:-20] + "77777.safetensors"}}},
    },
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_invalid_index_is_refused(good, case):
    files, whole = good
    assert refused_or_right(files | {INDEX: json.dumps(FOREIGN[case]).encode()}, whole)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"\x80abc", b""])
def test_an_index_that_is_not_json_is_refused(good, content):
    files, whole = good
    assert refused_or_right(files | {INDEX: content}, whole)


def test_a_missing_index_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tensors.json cannot be read: No such file"):
        Tensors.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"PK\x03\x04" * 16])
def test_a_foreign_part_is_refused(good, content):
    files, whole = good
    assert refused_or_right(files | {PART: content}, whole)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.ones(1, 3), r"weight/p\[0:1,0:4\] is F32 \[1, 3\]"),
        (torch.ones(1, 4, dtype=torch.int32), r"weight/p\[0:1,0:4\] is I32 \[1, 4\]"),
        (torch.ones(1, 4, dtype=torch.float64), "weight/p .* same dtype"),
    ],
)
def test_a_part_whose_boxes_do_not_match_the_index_is_refused(tmp_path, values, expected):
    write(
        tmp_path,
        {"p": numbered((2, 4))},
        [[("p", boxes.parse("1:2,0:4"))], [("p", boxes.parse("0:1,0:4"))]],
    )
    save_file({"weight/p[0:1,0:4]": values}, tmp_path / "part-00001.safetensors")
    with pytest.raises(CheckpointError, match=expected):
        Tensors.open(tmp_path).read("p")


def test_whole_tensors_are_written_in_parts_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PART_BYTES", 100)
    whole = {f"p{n}": numbered((n, 4)) for n in (7, 1, 2, 3, 9, 6)}
    tensors.write_whole(
        tmp_path, {name: tuple(x.shape) for name, x in whole.items()}, whole.items()
    )
    read = Tensors.open(tmp_path)
    assert all(same(read.read(name), values) for name, values in whole.items())
    sizes = [sum(x.nbytes for x in part) for part in parts_of(tmp_path, whole)]
    assert sizes == [112, 96, 144, 96]


def parts_of(folder: Path, whole: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    index = json.loads((folder / INDEX).read_text())["tensors"]
    files = {name: next(iter(entry["boxes"].values())) for name, entry in index.items()}
    return [
        [whole[name] for name in whole if files[name] == part.name]
        for part in sorted(folder.glob("part-*"))
    ]


def test_one_part_of_whole_tensors_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PART_BYTES", 64)  # two tensors
    references = []
    alive_counts = []

    def values_by_name():
        for n in range(9):
            values = numbered((8,))
            references.append(weakref.ref(values))
            alive_counts.append(sum(reference() is not None for reference in references))
            yield f"p{n}", values

    tensors.write_whole(tmp_path, {f"p{n}": (8,) for n in range(9)}, values_by_name())
    assert max(alive_counts) <= 3
    assert len(list(tmp_path.glob("part-*"))) == 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps (Linux)")
def test_files_that_were_read_do_not_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "CLOSE_AFTER_BYTES", 64)
    write(
        tmp_path,
        {"p": numbered((8,)), "q": numbered((8,))},
        [[("p", boxes.parse("0:8"))], [("q", boxes.parse("0:8"))]],
    )
    read = Tensors.open(tmp_path)
    values_read = [read.read("p")]
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    values_read.append(read.read("q"))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(same(values, numbered((8,))) for values in [*values_read, read.read("p")])
