"""Boxes against a tensor that numbers its elements: what they span, cut from, share and leave out."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.checkpoint import boxes

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """A tensor whose elements are their places in the flattened one."""
    return np.arange(math.prod(shape)).reshape(shape)


def elements(box: boxes.Box, shape: tuple[int, ...]) -> list[int]:
    """The places that ``box`` spans, row by row."""
    return numbered(shape)[boxes.slices(box)].flatten().tolist()


@st.composite
def spans(draw, length: int) -> range:
    start = draw(st.integers(0, length - 1))
    return range(start, draw(st.integers(start + 1, length)))


@st.composite
def boxes_in(draw, shape: tuple[int, ...]) -> boxes.Box:
    return tuple(draw(spans(length)) for length in shape)


@st.composite
def cuts(draw) -> tuple[tuple[int, ...], list[int]]:
    """A shape and the borders of runs of its elements, the first 0 and the last all; some runs are empty."""
    shape = draw(SHAPES)
    inner = draw(st.lists(st.integers(0, math.prod(shape)), max_size=4))
    return shape, sorted([0, *inner, math.prod(shape)])


@given(cuts())
def test_a_run_of_elements_is_its_boxes_side_by_side(drawn):
    shape, borders = drawn
    for start, stop in pairwise(borders):
        found = boxes.cut(shape, start, stop)
        assert [place for box in found for place in elements(box, shape)] == list(
            range(start, stop)
        )
        assert sum(map(boxes.size, found)) == stop - start


@given(cuts())
def test_a_run_of_elements_makes_few_boxes(drawn):
    shape, borders = drawn
    for start, stop in pairwise(borders):
        assert len(boxes.cut(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


@given(st.data())
def test_what_two_boxes_share_is_what_is_in_both(data):
    shape = data.draw(SHAPES)
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    shared = set(elements(a, shape)) & set(elements(b, shape))
    common = boxes.overlap(a, b)
    assert shared == (set() if common is None else set(elements(common, shape)))


@given(st.data())
def test_indices_within_another_box_find_the_same_elements(data):
    shape = data.draw(SHAPES)
    outer, other = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = boxes.overlap(outer, other)
    if common is not None:
        inner = boxes.within(common, outer)
        assert numbered(shape)[boxes.slices(outer)][
            boxes.slices(inner)
        ].flatten().tolist() == elements(common, shape)
        assert boxes.moved(inner, outer) == common


@given(cuts(), st.data())
def test_the_boxes_of_all_runs_are_the_tensor_and_not_with_one_missing_or_twice(drawn, data):
    shape, borders = drawn
    found = [box for start, stop in pairwise(borders) for box in boxes.cut(shape, start, stop)]
    found = data.draw(st.permutations(found))
    assert boxes.partition(found, shape)
    assert not boxes.partition(found[1:], shape)
    assert not boxes.partition([*found, found[0]], shape)


@given(st.data())
def test_boxes_are_the_tensor_when_they_number_each_element_once(data):
    """Any set of boxes, most of which overlap, miss some elements, or both with the right sum of sizes."""
    shape = data.draw(SHAPES)
    found = data.draw(st.lists(boxes_in(shape), max_size=4))
    numbers = sorted(place for box in found for place in elements(box, shape))
    assert boxes.partition(found, shape) == (numbers == list(range(math.prod(shape))))


@pytest.mark.parametrize(
    "found", ["0:2,0:2 0:2,0:2", "0:2,0:1 1:3,0:2", "0:1,0:4 0:1,0:4", "0:2,0:4 2:2,0:4"]
)
def test_boxes_whose_sizes_add_up_can_still_be_wrong(found):
    assert not boxes.partition([boxes.parse(box) for box in found.split()], (2, 4))


@pytest.mark.parametrize("found", ["0:4", "0:2,0:2,0:1", "2:0,0:2", "0:2,0:2 1:1,0:2"])
def test_boxes_of_other_dimensions_or_of_no_elements_are_not_the_tensor(found):
    assert not boxes.partition([boxes.parse(box) for box in found.split()], (2, 2))


@given(st.data())
def test_what_is_written_is_read_back(data):
    box = data.draw(boxes_in(data.draw(SHAPES)))
    assert boxes.parse(boxes.text(box)) == box


@pytest.mark.parametrize(
    "written",
    ["3", "0:3:4", "00:3", " 0:3", "0:1_0", "+0:3", "0:3,", ",", "0-3", "0:x", "0:٣", "0.0:3"],
)
def test_what_was_not_written_is_refused(written):
    with pytest.raises(ValueError):  # noqa: PT011  int's own words, or ours
        boxes.parse(written)
