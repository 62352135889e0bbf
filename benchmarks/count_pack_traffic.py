"""Count what the Triton kernels read, write and launch for packs of documents on one ring rank.

    python -m benchmarks.count_pack_traffic

Needs no GPU: everything follows from the masks of the hops and from the kernels' lists of tiles
(kernels/attention/tile_lists.py). The numbers are sums over all hops of the rank with the most
visible pairs, forward and backward, for one sample.

Columns: "pairs" are (query, key) pairs of one head in steps of the loops, of which "visible" is the
share that the mask allows and "masked" the share in steps that apply a mask. "tiles" are the tiles
with work, "of all" their share; "programs" are tiles times heads, and "fills" the loops that a
program starts, each of which waits for memory before it computes. MiB are of the loads and stores
of the programs, hits in the cache included: "inputs" q, k, v, dout, log-sum-exp, delta and key
ranges; "sums" the float32 state and gradients, read, written and added. "ideal" is each tensor
once: inputs of rows with work read once a hop, their sums read and written once a hop. "balance" is
the mean over the largest sum of loop steps of a processor, if programs go to the first that is
free, in their order.
"""

import argparse
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import (
    Column,
    check_outputs,
    plain_row,
    plain_titles,
    size_problems,
    write_json,
)
from benchmarks.document_packs import random_starts
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.errors import ConfigError, reporting_errors
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.tile_lists import TileList
from megatron_ring.kernels.attention.triton.blocks import (
    TABLE,
    Blocks,
    Generation,
    Kernel,
    blocks_for,
    has_fused_backward,
)
from megatron_ring.plan.ring_timeline import keys_of_hop, visible_pairs_per_hop

MIB = 2**20
FLOAT = 4
COLUMNS = {
    "hops": Column("hops", 5, 0),
    "launches": Column("launches", 9, 0),
    "tiles": Column("tiles", 7, 0),
    "tile_share": Column("of all", 7, 2),
    "programs": Column("programs", 9, 0),
    "fills": Column("fills", 8, 0),
    "pairs": Column("M pairs", 8, 1),
    "visible": Column("visible", 8, 2),
    "masked": Column("masked", 7, 2),
    "input_mib": Column("inputs", 8, 0),
    "sums_mib": Column("sums", 7, 0),
    "ideal_mib": Column("ideal", 7, 0),
    "balance": Column("balance", 8, 2),
}


@dataclass(frozen=True)
class Shape:
    """Heads of a model and bytes of an input's element."""

    heads: int
    groups: int
    head_dim: int
    itemsize: int = 2


def main() -> None:
    options = _parser().parse_args()
    check_outputs(json=options.json)
    sizes = ("tokens", "mean_document", "ranks", "stripe_sizes", "head_dim", "processors")
    if problems := size_problems(options, *sizes):
        raise ConfigError(problems)
    shape = Shape(options.heads, options.kv_heads, options.head_dim)
    mask = Mask(document_starts=random_starts(options.mean_document, options.tokens))
    rows = []
    for stripe_size in options.stripe_sizes:
        layout = Layout("striped", options.tokens, options.ranks, stripe_size)
        rank = int(visible_pairs_per_hop(layout, mask).work_RR.sum(dim=0).argmax())
        hops = [
            hop_key_ranges(layout, rank, keys_of_hop(layout, mask, rank, hop), mask)
            for hop in range(options.ranks)
        ]
        print(f"\nstriped by {stripe_size}, rank {rank}\n{'':10}{plain_titles(COLUMNS)}")
        for kernel in kernels_of(options.head_dim, options.generation):
            blocks = blocks_for(kernel, options.head_dim, options.generation)
            row = count(kernel, hops, shape, blocks, options.processors)
            print(f"{kernel:10}{plain_row(COLUMNS, row)}", flush=True)
            rows.append({"stripe_size": stripe_size, "kernel": kernel} | row)
    write_json(options.json, {"options": vars(options), "rows": rows})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per pack")
    parser.add_argument("--mean-document", type=int, default=4096, help="mean tokens of a document")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the ring")
    parser.add_argument("--stripe-sizes", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key-value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--generation", choices=TABLE, default="hopper", help="whose tiles")
    parser.add_argument(
        "--processors", type=int, default=132, help="programs that run at a time; 132 on an H100"
    )
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def kernels_of(head_dim: int, generation: Generation) -> list[Kernel]:
    """Return the kernels that exist for this head dim."""
    fused: list[Kernel] = ["fused"] if has_fused_backward(head_dim, generation) else []
    return ["forward", *fused, "queries", "keys"]


def count(
    kernel: Kernel, hops: list[KeyRanges], shape: Shape, blocks: Blocks, processors: int
) -> dict[str, Any]:
    """Sum the counts of ``kernel`` over ``hops``."""
    total: dict[str, float] = {}
    for ranges in hops:
        for name, value in _of_hop(kernel, ranges, shape, blocks, processors).items():
            total[name] = total.get(name, 0) + value
    pairs = total["pairs"]
    return {
        "hops": len(hops),
        "launches": total["launches"],
        "tiles": total["tiles"],
        "tile_share": total["tiles"] / total["all_tiles"],
        "programs": total["programs"],
        "fills": total["fills"],
        "pairs": pairs / 1e6,
        "visible": total["visible"] / pairs,
        "masked": total["masked"] / pairs,
        "input_mib": total["input_bytes"] / MIB,
        "sums_mib": total["sums_bytes"] / MIB,
        "ideal_mib": total["ideal_bytes"] / MIB,
        "balance": total["mean_steps"] / total["largest_steps"],
    }


def _of_hop(
    kernel: Kernel, ranges: KeyRanges, shape: Shape, blocks: Blocks, processors: int
) -> dict[str, float]:
    cpu = torch.device("cpu")
    queries = keys = len(ranges.lo)
    over_keys = kernel in ("forward", "queries")
    if over_keys:
        block, step = blocks.block_q, blocks.block_k
        listed = ranges.query_tiles(block, step, cpu)
    else:
        block, step = blocks.block_k, blocks.block_q
        listed = ranges.key_tiles(keys, block, step, cpu)
    tiles = TileList(*listed.long().unbind(1))
    steps = -(-tiles.columns // step)
    unmasked = (tiles.unmasked_to - tiles.unmasked_from) // step
    of_queries = int((ranges.hi > ranges.lo).sum())
    of_keys = int((torch.sub(*reversed(ranges._transposed(keys))) > 0).sum())

    row = shape.head_dim * shape.itemsize
    wide = shape.head_dim * FLOAT
    visited = len(tiles.start) * block  # rows of tiles; those after the last are not accessed
    visited = min(visited, queries if over_keys else keys)
    columns = int(steps.sum()) * step
    per_query = {"forward": row, "queries": 2 * row + 2 * FLOAT}.get(kernel, 2 * row + 2 * FLOAT)
    if over_keys:
        programs_per_tile = shape.heads
        read = shape.heads * (visited * per_query + columns * 2 * row)
        sums = shape.heads * visited * 2 * (wide + (FLOAT if kernel == "forward" else 0))
        heads_per_program = 1
    else:
        programs_per_tile = shape.groups
        heads_per_program = shape.heads // shape.groups
        read = shape.groups * visited * 2 * row + shape.heads * columns * per_query
        sums = shape.groups * visited * 4 * wide
        if kernel == "fused":
            sums += shape.heads * columns * wide
    read += programs_per_tile * (visited * 8 + 20 * len(tiles.start))
    ideal = shape.heads * of_queries * per_query + shape.groups * of_keys * 2 * row
    sums_of_queries = shape.heads * of_queries * 2 * wide
    sums_of_keys = shape.groups * of_keys * 4 * wide
    ideal += {"fused": sums_of_queries + sums_of_keys, "keys": sums_of_keys}.get(
        kernel, sums_of_queries
    )
    busy = _busiest(steps.tolist(), programs_per_tile, heads_per_program, processors)
    total_steps = int(steps.sum()) * programs_per_tile * heads_per_program
    return {
        "launches": int(len(tiles.start) > 0),
        "tiles": len(tiles.start),
        "all_tiles": -(-(queries if over_keys else keys) // block),
        "programs": programs_per_tile * len(tiles.start),
        "fills": programs_per_tile * int(_loops(kernel, tiles, heads_per_program).sum()),
        "pairs": int(steps.sum()) * step * block,
        "visible": ranges.visible_pairs,
        "masked": int((steps - unmasked).sum()) * step * block,
        "input_bytes": read,
        "sums_bytes": sums,
        "ideal_bytes": ideal,
        "mean_steps": total_steps / processors,
        "largest_steps": busy,
    }


def _loops(kernel: Kernel, tiles: TileList, heads_per_program: int) -> torch.Tensor:
    """Return how many loops with at least one step a program of each tile has."""
    unmasked = (tiles.unmasked_to > tiles.unmasked_from).long()
    before = (tiles.unmasked_from > tiles.first).long()
    after = (tiles.stop > tiles.unmasked_to).long()
    if kernel == "fused":
        return unmasked + (before | after)
    return (before + unmasked + after) * heads_per_program


def _busiest(steps: list[int], programs: int, heads: int, processors: int) -> float:
    """Return the most loop steps of a processor, if each program goes to the first that is free."""
    free = [0] * processors
    for step in _in_launch_order(steps, programs):
        heapq.heapreplace(free, free[0] + step * heads)
    return max(free)


def _in_launch_order(steps: list[int], programs: int) -> Iterator[int]:
    for step in steps:
        yield from (step for _ in range(programs))


if __name__ == "__main__":
    with reporting_errors():
        main()
