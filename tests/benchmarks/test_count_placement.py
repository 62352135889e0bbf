"""The count of placements: its rows, and sizes that it refuses."""

import json

import numpy as np
import pytest

from benchmarks import count_placement
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.context_parallel.sample_blocks import BLOCK, HopCosts
from megatron_ring.context_parallel.visible_rows import visible_keys
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention.tile_lists import tile_list
from megatron_ring.parallel.peers import peers_in_hop


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["count_placement", *flags])
    count_placement.main()


def test_a_small_count_has_all_layouts_and_their_measures(tmp_path, monkeypatch, capsys):
    path = tmp_path / "count.json"
    sizes = ["--tokens", "32768", "--ranks", "4", "--packs", "2"]
    run(monkeypatch, *sizes, "--json", str(path))
    assert "32,768 tokens on 4 ranks" in capsys.readouterr().out
    rows = {row["layout"]: row for row in json.loads(path.read_text())["rows"]}
    assert {"tokens", "spread", "zigzag", "contiguous", "placed", "worst"} == set(rows)
    for name in ("spread", "zigzag", "contiguous", "placed"):
        assert rows[name]["tiles"] == 1
        assert rows[name]["direct"] <= rows[name]["forwarded"]
    assert rows["tokens"]["over_single_tokens"] == rows["spread"]["over_spread"] == 1
    assert rows["placed"]["direct"] < rows["spread"]["direct"] < rows["tokens"]["direct"] <= 1
    assert rows["placed"]["time"] <= 0.98
    assert rows["placed"]["time"] <= rows["worst"]["time"]


def test_single_tokens_are_counted_as_the_kernels_lists_of_tiles_say():
    starts, layout = (0, 3, 700, 701, 1500, 2040), Layout("striped", 2048, 4)
    counted = count_placement.single_tokens(starts, 2048, 4, HopCosts())
    mask = Mask(document_starts=starts)
    for rank in range(4):
        for hop in range(4):
            peers = peers_in_hop(rank, 4, hop)
            ranges = hop_key_ranges(layout, rank, peers.sender, mask)
            listed = tile_list(ranges.lo, ranges.hi, BLOCK, BLOCK)
            assert counted.tiles_RR[hop, rank] == (-(-listed.columns // BLOCK)).sum()
            assert counted.query_tiles_RR[hop, rank] == len(listed.start)
            rows = len(visible_keys(layout, peers.receiver, rank, mask)) if hop else 0
            assert counted.direct.rows_RR[hop, rank] == rows
    # A document of n tokens sends n - 1, n - 2 and n - 3 of them to the ranks after.
    lengths = np.diff([*starts, 2048])
    assert counted.direct.rows_RR.sum() == np.maximum(lengths - [[1], [2], [3]], 0).sum()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "5000", "--ranks", "8"], "positive multiple of 2048"),
        (["--packs", "0"], "packs 0"),
    ],
)
def test_sizes_that_cannot_be_counted_are_refused_with_the_rule(monkeypatch, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(monkeypatch, *flags)
