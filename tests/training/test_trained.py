"""The matrix's judge: it puts parts together, and lets nothing pass that is off on any rank."""

import dataclasses

import pytest
import torch

from tests.training.trained import Part, Trained, faults

WHOLE = torch.arange(1.0, 13.0).view(3, 4)
NORM = torch.ones(3)


def of_rank(columns: slice, norm: torch.Tensor = NORM) -> Trained:
    """A rank that has some columns of one parameter, and all of another."""
    parts = {"matrix": Part(1, columns.start, WHOLE[:, columns]), "norm.weight": Part(0, 0, norm)}
    return Trained([(4.0, 1.0), (3.0, 2.0)], 30.0, parts)


ALONE = of_rank(slice(0, 4))
FIRST, SECOND = of_rank(slice(0, 3)), of_rank(slice(3, 4))


def test_parts_of_equal_ranks_are_the_whole():
    assert faults([ALONE], ALONE) == []
    assert faults([SECOND, FIRST, SECOND], ALONE) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"steps": [(4.0, 1.0), (3.0001, 2.0)]}, "loss of a step: off by 3.3e-05"),
        ({"steps": [(4.0, 1.0001), (3.0, 2.0)]}, "gradient norm of a step: off by 1.0e-04"),
        ({"steps": [(4.0, 1.0), (float("nan"), 2.0)]}, "loss of a step: off by nan"),
        ({"validation": 30.001}, "validation loss: off by 3.3e-05"),
    ],
)
def test_a_figure_that_is_off_on_the_second_rank(changed, fault):
    assert faults([FIRST, dataclasses.replace(SECOND, **changed)], ALONE) == [fault]


def test_an_entry_that_is_off_is_measured_by_the_largest():
    off = dataclasses.replace(
        SECOND, parts=SECOND.parts | {"matrix": Part(1, 3, WHOLE[:, 3:] + 0.0012)}
    )
    assert faults([FIRST, off], ALONE) == ["matrix: off by 1.0e-04"]


def test_copies_are_the_same_to_the_last_bit():
    assert faults([FIRST, of_rank(slice(3, 4), NORM.nextafter(2 * NORM))], ALONE) == [
        "copies of norm.weight differ"
    ]


def test_a_parameter_that_nobody_has():
    without = dataclasses.replace(ALONE, parts={"matrix": ALONE.parts["matrix"]})
    for of_ranks, alone in (([without], ALONE), ([ALONE], without)):
        (fault,) = faults(of_ranks, alone)
        assert fault.endswith("['norm.weight']")
