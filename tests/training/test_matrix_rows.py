"""Rows of the parity matrix that fail, or that there is no time for, are reported as such."""

import pytest

from megatron_ring.config import Config
from tests.training import tiny
from tests.training.covering import Assignment
from tests.training.matrix import AXES, COUNTERPARTS, Matrix, OneProcess
from tests.training.trained import TOLERANCE


def config(row: Assignment) -> Config:
    if row["fault"] == "error":
        raise ValueError("no such row")
    training = {"adam_eps": 1e-3}  # see factors.py
    if row["fault"] == "other numbers":
        training["weight_decay"] = 0.5
    return tiny.config(
        parallel={"context_parallel_size": row["ring"], "context_parallel": row["layout"]},
        training=training,
    )


FACTORS = {name: (1,) for name in AXES} | {
    "ring": (1, 2),
    "layout": ("none", "striped"),
    "documents": ("ignored",),
    "fault": ("", "error", "other numbers"),
}
MATRIX = Matrix(FACTORS, ("documents",), config)
ON_TWO = {"ring": 2, "layout": "striped"}


def one_process(folder, **settings) -> OneProcess:
    return OneProcess(MATRIX, {"ignored": tiny.write_store(folder)}, 2, **settings)


def test_rows_after_one_that_fails_are_trained_and_compared(tmp_path):
    faults = ("error", "other numbers", "")
    rows = [MATRIX.defaults_with(fault=fault, **ON_TWO) for fault in faults]
    found = one_process(tmp_path).compare(rows, 2, lambda row: TOLERANCE)
    assert (found.rows, found.left_out) == (3, 0)
    failed, differing = (MATRIX.describe(row) for row in rows[:2])
    assert found.differences.keys() == {failed, differing}
    assert "ValueError: no such row" in found.differences[failed][0]
    assert any("off by" in difference for difference in found.differences[differing])


@pytest.mark.parametrize("phases", [[(COUNTERPARTS, 2)], [(2,), (COUNTERPARTS,)]], ids=str)
def test_rows_that_there_is_no_time_for_are_counted(phases, tmp_path):
    rows = [MATRIX.defaults_with(**ON_TWO)]
    late = one_process(tmp_path, seconds=-1)
    found = late.compare_concurrently(rows, phases, lambda row: TOLERANCE)
    assert found[2] == type(found[2])(rows=0, left_out=1, differences={})
