"""Count work, query tiles and traffic of a ring whose documents are placed by size, and without.

    python -m benchmarks.count_placement

Needs no GPU: packs are drawn from a histogram of document lengths, and everything is counted in
tiles of 128 x 128 (context_parallel/sample_blocks.py, plan/placement_simulation.py). Time is in
the units of context_parallel/placement_cost.py; with --query-tile-cost in tiles.

Rows: "tokens" are single tokens in turn, "spread" stripes of 128, "placed" the placement. "worst"
is the largest value of the placement over the packs, all else are means over them.

Columns: "work" is the time of the slowest rank's work over the mean, "in tiles" the same of visited
tiles alone. "path" is the critical path over the mean work. "tiles" are over those of the unsplit
pack. "q" are the query tiles loaded over all hops, over those of single tokens and over those of
stripes of 128. "sent" are the rows that leave a rank over those of a ring that sends all, if they
are forwarded around the ring and if they go directly, "most" those of the rank that sends the most
directly. "time" is the critical path over that of "spread", "ms" the CPU time that the placement
takes to compute.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Column, check_outputs, plain_row, plain_titles, setting, write_json
from benchmarks.document_histogram import PUBLISHED, read_histogram
from megatron_ring.context_parallel.placement import place_documents
from megatron_ring.context_parallel.placement_cost import measured_costs
from megatron_ring.context_parallel.sample_blocks import (
    BLOCK,
    HopCosts,
    SampleBlocks,
)
from megatron_ring.errors import ConfigError, not_positive, reporting_errors
from megatron_ring.parallel.peers import receivers_RR, senders_RR
from megatron_ring.plan.placement_simulation import Simulation, Traffic, simulate

COLUMNS = {
    "imbalance": Column("work", 7, 3),
    "tile_imbalance": Column("in tiles", 10, 3),
    "path": Column("path", 7, 3),
    "tiles": Column("tiles", 7, 3),
    "over_single_tokens": Column("q/tokens", 10, 3),
    "over_spread": Column("q/spread", 10, 3),
    "forwarded": Column("sent ring", 11, 3),
    "direct": Column("direct", 8, 3),
    "direct_most": Column("most", 7, 3),
    "time": Column("time", 7, 3),
    "milliseconds": Column("ms", 5, 0),
}


def main() -> None:
    options = _parser().parse_args()
    check_outputs(json=options.json)
    _check(options)
    histogram = read_histogram(options.histogram)
    costs = measured_costs()
    if options.query_tile_cost is not None:
        costs = HopCosts(query_tile=options.query_tile_cost)
    rows = []
    for tokens in options.tokens:
        packs = [histogram.starts(tokens, seed) for seed in range(options.packs)]
        for ranks in options.ranks:
            print(f"\n{tokens:,} tokens on {ranks} ranks\n{'':11}{plain_titles(COLUMNS)}")
            counted = [dict(count(starts, tokens, ranks, costs)) for starts in packs]
            for name, row in _over_packs(counted):
                print(f"{name:11}{plain_row(COLUMNS, row)}", flush=True)
                rows.append({"tokens": tokens, "ranks": ranks, "layout": name} | row)
            kept = sum("placed" not in of_pack for of_pack in counted)
            if kept:
                print(f"spread is kept for {kept} of {len(packs)} packs")
    write_json(options.json, setting("count_placement", options, "cpu") | {"rows": rows})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[262144, 1048576])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64], help="ring sizes")
    parser.add_argument("--packs", type=int, default=4, help="packs to draw, from seeds 0, 1, ...")
    parser.add_argument("--histogram", type=Path, default=PUBLISHED, help="CSV of lengths")
    parser.add_argument(
        "--query-tile-cost", type=float, help="price of loading a query tile, in visited tiles"
    )
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def _check(options: argparse.Namespace) -> None:
    problems = not_positive(options, "packs")
    for ranks in options.ranks:
        # Zigzag's chunks are whole blocks, so that all layouts are counted in the same tiles.
        multiple = 2 * BLOCK * ranks
        problems += [
            f"{tokens} tokens on {ranks} ranks cannot be counted: they must be a positive multiple "
            f"of {multiple} (2 x {BLOCK} x ranks). Set --tokens or --ranks."
            for tokens in options.tokens
            if ranks < 2 or tokens < 1 or tokens % multiple
        ]
    if problems:
        raise ConfigError(problems)


def count(
    starts: tuple[int, ...], tokens: int, ranks: int, costs: HopCosts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Count every layout of one pack; yield its name and its row. A placement only if chosen."""
    blocks = SampleBlocks.of(np.array(starts), tokens, ranks)
    simulations = {
        "tokens": single_tokens(starts, tokens, ranks, costs),
        "spread": simulate(blocks, blocks.stripes(), costs),
        "zigzag": simulate(blocks, blocks.zigzag(), costs),
        "contiguous": simulate(blocks, blocks.contiguous(), costs),
    }
    begin = time.process_time()
    placement = place_documents(starts, tokens, ranks, costs=costs)
    milliseconds = 1000 * (time.process_time() - begin)
    if placement:
        simulations["placed"] = simulate(blocks, placement.owners, costs)
    for name, simulation in simulations.items():
        row = _row(simulation, simulations["tokens"], simulations["spread"])
        row["tiles"] = float(simulation.tiles_RR.sum() / blocks.tiles.sum())
        yield name, row | ({"milliseconds": milliseconds} if name == "placed" else {})


def _row(simulation: Simulation, tokens: Simulation, spread: Simulation) -> dict[str, float]:
    tiles = simulation.tiles_RR.sum(0)
    query_tiles = simulation.query_tiles_RR.sum()
    return {
        "imbalance": simulation.imbalance,
        "tile_imbalance": float(tiles.max() / tiles.mean()),
        "path": simulation.critical_path() / simulation.mean,
        "over_single_tokens": float(query_tiles / tokens.query_tiles_RR.sum()),
        "over_spread": float(query_tiles / spread.query_tiles_RR.sum()),
        "forwarded": simulation.forwarded.share,
        "direct": simulation.direct.share,
        "direct_most": simulation.direct.share_of_most,
        "time": simulation.critical_path() / spread.critical_path(),
    }


def single_tokens(starts: tuple[int, ...], tokens: int, ranks: int, costs: HopCosts) -> Simulation:
    """Count the layout that assigns single tokens to the ranks in turn."""
    position = np.arange(tokens)
    document = np.searchsorted(starts, position, side="right") - 1
    first_key = np.array(starts)[document]
    source = np.arange(ranks)
    senders, receivers = senders_RR(ranks), receivers_RR(ranks)
    work = np.zeros((2, ranks, ranks), dtype=np.int64)
    for rank in range(ranks):
        # Rank s owns s, s + R, ...; of these, row by row, the keys [lo, hi) are visible.
        lo = -((source - first_key[rank::ranks, None]) // ranks)
        hi = (position[rank::ranks, None] - source) // ranks + 1
        sees = (hi > lo).reshape(-1, BLOCK, ranks)
        first = np.where(sees, lo.reshape(sees.shape), tokens).min(1) // BLOCK
        stop = -(-np.where(sees, hi.reshape(sees.shape), 0).max(1) // BLOCK)
        has_work = sees.any(1)
        of_source = np.where(has_work, stop - first, 0).sum(0), has_work.sum(0)
        work[:, :, rank] = np.stack(of_source)[:, senders[:, rank]]
    # The tokens after a row are on the ranks after its own, so either way it is sent to as many.
    ends = np.append(starts[1:], tokens)[document]
    sent = np.zeros((ranks, ranks))
    for distance in range(1, ranks):
        sent[distance] = (ends - position > distance).reshape(-1, ranks).sum(0)
    directly = sent[(receivers - source) % ranks, source]
    return Simulation(costs, *work, Traffic(sent, tokens), Traffic(directly, tokens))


def _over_packs(
    counted: list[dict[str, dict[str, Any]]],
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the mean row of every layout, and the largest values of the placement."""
    for name in ("tokens", "spread", "zigzag", "contiguous", "placed"):
        rows = [of_pack[name] for of_pack in counted if name in of_pack]
        if rows:
            yield name, {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    placed = [of_pack["placed"] for of_pack in counted if "placed" in of_pack]
    if placed:
        yield "worst", {key: max(row[key] for row in placed) for key in placed[0]}


if __name__ == "__main__":
    with reporting_errors():
        main()
