"""Random document boundaries: where documents start, and how their lengths are distributed."""

import math

import pytest
import torch

from benchmarks.document_packs import random_starts, starts_of


@pytest.mark.parametrize(
    ("lengths", "starts"),
    [([3, 1, 4], (0, 3, 4)), ([8], (0,)), ([3, 5, 2], (0, 3)), ([3, 9], (0, 3))],
    ids=["filled exactly", "one document", "filled early", "last one cut"],
)
def test_documents_start_where_the_previous_one_ends(lengths, starts):
    assert starts_of(lengths, 8) == starts


def test_every_sample_starts_with_a_new_document():
    starts = random_starts(5, 16, samples=3)
    assert {0, 16, 32} <= set(starts)
    assert list(starts) == sorted(set(starts))
    assert starts[-1] < 48


def test_packs_depend_on_the_seed_alone():
    assert random_starts(5, 64) == random_starts(5, 64)
    assert random_starts(5, 64) != random_starts(5, 64, seed=1)


def test_lengths_are_lognormal():
    lengths = torch.tensor([*random_starts(100, 2**20), 2**20]).diff().double()
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(100, rel=0.05)
    assert lengths.median() == pytest.approx(100 / math.sqrt(math.e), rel=0.05)


def test_a_mean_below_one_token_gives_documents_of_one_token():
    assert random_starts(0.01, 4) == (0, 1, 2, 3)
