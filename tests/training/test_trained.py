"""The comparison of the parity matrix assembles parts and finds a difference on any rank."""

import dataclasses

import pytest
import torch

from tests.training.trained import Part, Trained, differences

WHOLE = torch.arange(1.0, 13.0).view(3, 4)
NORM = torch.ones(3)


def of_rank(columns: slice, norm: torch.Tensor = NORM) -> Trained:
    """Return the result of a rank that has some columns of one parameter and all of another."""
    parts = {"matrix": Part(1, columns.start, WHOLE[:, columns]), "norm.weight": Part(0, 0, norm)}
    return Trained([(4.0, 1.0), (3.0, 2.0)], 30.0, parts)


ALONE = of_rank(slice(0, 4))
FIRST, SECOND = of_rank(slice(0, 3)), of_rank(slice(3, 4))


def test_parts_of_equal_ranks_assemble_to_the_whole():
    assert differences([ALONE], ALONE) == []
    assert differences([SECOND, FIRST, SECOND], ALONE) == []


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"steps": [(4.0, 1.0), (3.0001, 2.0)]}, "loss of a step: off by 3.3e-05"),
        ({"steps": [(4.0, 1.0001), (3.0, 2.0)]}, "gradient norm of a step: off by 1.0e-04"),
        ({"steps": [(4.0, 1.0), (float("nan"), 2.0)]}, "loss of a step: off by nan"),
        ({"validation": 30.001}, "validation loss: off by 3.3e-05"),
    ],
)
def test_a_wrong_number_on_the_second_rank_is_found(changed, difference):
    assert differences([FIRST, dataclasses.replace(SECOND, **changed)], ALONE) == [difference]


def test_a_parameter_error_is_relative_to_its_largest_entry():
    wrong = dataclasses.replace(
        SECOND, parts=SECOND.parts | {"matrix": Part(1, 3, WHOLE[:, 3:] + 0.0012)}
    )
    assert differences([FIRST, wrong], ALONE) == ["matrix: off by 1.0e-04"]


def test_copies_that_differ_in_one_bit_are_found():
    assert differences([FIRST, of_rank(slice(3, 4), NORM.nextafter(2 * NORM))], ALONE) == [
        "copies of norm.weight differ"
    ]


def test_a_missing_parameter_is_found():
    without = dataclasses.replace(ALONE, parts={"matrix": ALONE.parts["matrix"]})
    for of_ranks, alone in (([without], ALONE), ([ALONE], without)):
        (difference,) = differences(of_ranks, alone)
        assert difference.endswith("['norm.weight']")
