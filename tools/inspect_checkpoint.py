"""What is in a checkpoint, how it was made, and in what two differ: a command line over checkpoint/summary.py."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from megatron_ring.checkpoint import report
from megatron_ring.checkpoint.compare import Comparison
from megatron_ring.checkpoint.locate import locate, verify
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import reporting_errors

EQUAL, DIFFERENT = 0, 1


@dataclass(frozen=True)
class Options:
    """Show a checkpoint, or compare two: then the exit code is 0 where all tensors are equal, and 1 where not.

    Options that differ are shown, and do not count. Norm, mean and largest are of the finite elements.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The folder of a checkpoint, or one given as --save: then the checkpoint that latest names."""
    other: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OTHER]")] = None
    """Another, to compare it with."""
    kind: Literal["weight", "exp_avg", "exp_avg_sq"] = "weight"
    """What of each parameter is looked at: itself, or one of Adam's two moments."""
    tensors: str = "*"
    """Which parameters, as a shell pattern: 'blocks.0.*'."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Before anything else, read every byte and check it against the checksum it was written with."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""


def run(options: Options) -> int:
    """Print what was asked for; the exit code. Raises CheckpointError."""
    summaries = [
        _opened(path, options.verify) for path in (options.checkpoint, options.other) if path
    ]
    if options.other is None:
        return _show(*summaries, options)
    return _compare(Comparison(*summaries, options.kind, options.tensors), options.json)


def _opened(given: Path, verified: bool) -> Summary:
    located = locate(given)
    if located.note:
        print(located.note, file=sys.stderr)
    if verified:
        verify(located.path)
        print(f"{located.path}: verified, every byte is as it was written.", file=sys.stderr)
    return Summary.of(located.path)


def _show(summary: Summary, options: Options) -> int:
    names = summary.names(options.kind, options.tensors)
    rows = _rows(summary.rows(names, options.kind), len(names))
    if options.json:
        print(
            json.dumps(report.document(summary) | {"kind": options.kind, "tensors": rows}, indent=2)
        )
    else:
        print(*report.described(summary), *report.table(rows), sep="\n")
    return EQUAL


def _compare(comparison: Comparison, as_json: bool) -> int:
    names = comparison.names()
    rows = _rows(comparison.rows(names), len(names.common))
    different = [row["name"] for row in rows if not row["equal"]]
    equal = names.same and not different
    if as_json:
        print(
            json.dumps(
                report.comparison_document(comparison, names) | {"tensors": rows, "equal": equal},
                indent=2,
            )
        )
    else:
        print(*report.compared(comparison, names), *report.table(rows), sep="\n")
        print(
            "equal"
            if equal
            else f"different: the values of {len(different)} of {len(rows)} tensors in both"
        )
    return EQUAL if equal else DIFFERENT


def _rows(rows: Iterable[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    return list(tqdm(rows, total=total, unit="tensor", delay=1, disable=None, leave=False))


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Leaves with that of the error whose message was printed."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments, description=Options.__doc__)
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
