"""Packs drawn from a histogram of document lengths, and files that are not one."""

import pytest
import torch

from benchmarks.document_histogram import read_histogram
from megatron_ring.errors import DataError


def test_the_published_histogram_has_the_figures_that_are_quoted_of_it():
    bins = read_histogram()
    assert int(bins.documents.sum()) == 13_463_214
    tokens = bins.documents * (bins.shortest + bins.longest) / 2
    assert float(tokens.sum() / bins.documents.sum()) == pytest.approx(1782, abs=1)
    assert float(tokens[bins.longest <= 4096].sum() / tokens.sum()) == pytest.approx(0.43, abs=0.01)
    assert float(tokens[bins.shortest > 32768].sum() / tokens.sum()) == pytest.approx(
        0.25, abs=0.01
    )


def test_lengths_are_drawn_by_the_counts():
    bins = read_histogram()
    starts = torch.tensor(bins.starts(1 << 22, seed=1))
    lengths = starts.diff()
    assert starts[0] == 0
    assert int(lengths.min()) >= 1
    assert int(lengths.max()) <= 196608
    # 14 bins; over two thousand documents, shares are within a few percent.
    share = float((lengths <= 1024).double().mean())
    assert share == pytest.approx(0.714, abs=0.03)


def test_packs_depend_on_the_seed_alone():
    bins = read_histogram()
    assert bins.starts(65536, 3) == bins.starts(65536, 3)
    assert bins.starts(65536, 3) != bins.starts(65536, 4)
    assert bins.starts(1, 0) == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns must be from,to,documents"),
        ("from,to\n1,2\n", "columns must be from,to,documents"),
        ("# a comment\nfrom,to,documents\n1,2,x\n", "line 3: 1,2,x is not a bin"),
        ("from,to,documents\n5,2,1\n", "line 2: 5,2,1 is not a bin"),
        ("from,to,documents\n1,2\n", "line 2: 1,2 is not a bin"),
        ("from,to,documents\n1,2,0\n", "counts no documents"),
    ],
)
def test_a_file_that_is_no_histogram_is_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_histogram(path)


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(DataError, match="absent.csv"):
        read_histogram(tmp_path / "absent.csv")
