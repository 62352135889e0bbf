"""Count padding and the work of data ranks under every packing of whole documents.

    python -m benchmarks.count_packing

Needs no GPU: lengths are drawn from a histogram, and packs are those of data/bin_packing.py. A
document longer than a sample is cut. Work is the number of pairs of a causal mask within documents.

Columns: "padding" is the share of positions without a token. "largest" is the work of the sample
with the most over the mean. "in order" and "by work" are the work of the data rank with the most
over the mean of a step's ranks, averaged over steps, for both values of --sample-assignment.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import (
    Column,
    check_outputs,
    plain_row,
    plain_titles,
    setting,
    write_json,
)
from benchmarks.document_histogram import PUBLISHED, read_histogram
from megatron_ring.data.bin_packing import PACKERS
from megatron_ring.data.sample_assignment import by_work, imbalance, in_order, visible_pairs
from megatron_ring.data.whole_documents import cut
from megatron_ring.errors import ConfigError, not_positive, reporting_errors

COLUMNS = {
    "samples": Column("samples", 8, 0),
    "padding": Column("padding", 8, 4),
    "largest": Column("largest", 8, 2),
    "in_order": Column("in order", 9, 2),
    "by_work": Column("by work", 8, 2),
}


def main() -> None:
    options = _parser().parse_args()
    check_outputs(json=options.json)
    _check(options)
    lengths = read_histogram(options.histogram).lengths(options.documents, seed=0)
    rows = []
    for seq_length in options.seq_length:
        step = f"{options.data_ranks} data ranks, {options.samples_per_rank} samples each a step"
        print(f"\nsamples of {seq_length:,} tokens, {step}\n{'':11}{plain_titles(COLUMNS)}")
        for packing, row in count(
            lengths, seq_length, options.data_ranks, options.samples_per_rank
        ):
            print(f"{packing:11}{plain_row(COLUMNS, row)}", flush=True)
            rows.append({"seq_length": seq_length, "packing": packing} | row)
    write_json(options.json, setting("count_packing", options, "cpu") | {"rows": rows})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, nargs="+", default=[32768, 131072, 1048576])
    parser.add_argument("--documents", type=int, default=131072, help="documents to draw")
    parser.add_argument("--data-ranks", type=int, default=8)
    parser.add_argument("--samples-per-rank", type=int, default=1, help="of a step")
    parser.add_argument("--histogram", type=Path, default=PUBLISHED, help="CSV of lengths")
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def _check(options: argparse.Namespace) -> None:
    names = "documents", "data_ranks", "samples_per_rank"
    problems = [problem for name in names for problem in not_positive(options, name)]
    problems += [
        f"seq_length {tokens} must be at least 1. Set --seq-length."
        for tokens in options.seq_length
        if tokens < 1
    ]
    if problems:
        raise ConfigError(problems)


def count(
    lengths: np.ndarray, seq_length: int, data_ranks: int, samples_per_rank: int
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield each packing's name and its row; no imbalance if the samples fill no step."""
    document_of_piece, begins = cut(lengths, seq_length)
    pieces = np.minimum(lengths[document_of_piece] - begins, seq_length)
    for packing, fit in PACKERS.items():
        packs = fit(pieces, seq_length)
        work = np.array([visible_pairs(pieces[packs[n]]) for n in range(len(packs))])
        shuffled = np.random.default_rng(0).permutation(work)
        size = data_ranks * samples_per_rank
        steps = shuffled[: len(work) // size * size].reshape(-1, size)
        in_order_of = [imbalance(step, in_order(size), data_ranks, 1) for step in steps]
        by_work_of = [
            imbalance(step, by_work(step, data_ranks, 1), data_ranks, 1) for step in steps
        ]
        yield (
            packing,
            {
                "samples": len(packs),
                "padding": 1 - int(lengths.sum()) / (len(packs) * seq_length),
                "largest": float(work.max() / work.mean()),
                "in_order": float(np.mean(in_order_of)) if in_order_of else None,
                "by_work": float(np.mean(by_work_of)) if by_work_of else None,
            },
        )


if __name__ == "__main__":
    with reporting_errors():
        main()
