"""Shows the content and provenance of a checkpoint, or the difference of two checkpoints."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro
from tqdm import tqdm

from megatron_ring.checkpoint import report
from megatron_ring.checkpoint.compare import Comparison
from megatron_ring.checkpoint.locate import locate, verify
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import reporting_errors

EQUAL = 0
DIFFERENT = 1


@dataclass(frozen=True)
class Options:
    """Show a checkpoint, or compare two: the exit code is 0 if all tensors are equal, otherwise 1.

    Options that differ are shown but do not change the exit code. Norm, mean and largest value are
    over the finite elements.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a checkpoint, or a --save folder, of which the latest checkpoint is used."""
    other: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OTHER]")] = None
    """Checkpoint to compare it with."""
    kind: Literal["weight", "exp_avg", "exp_avg_sq"] = "weight"
    """Which tensor of each parameter is shown: itself, or one of Adam's two moments."""
    tensors: str = "*"
    """Shell pattern for the names of the parameters, such as 'blocks.0.*'."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """First verify every byte against the checksums stored in the checkpoint."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""


def run(options: Options) -> int:
    """Print the summary or the comparison and return the exit code. Raises CheckpointError."""
    summary = _open(options.checkpoint, options.verify)
    if options.other is None:
        return _show(summary, options)
    other = _open(options.other, options.verify)
    return _compare(Comparison(summary, other, options.kind, options.tensors), options.json)


def _open(given: Path, verify_bytes: bool) -> Summary:
    located = locate(given)
    if located.note:
        print(located.note, file=sys.stderr)
    if verify_bytes:
        verify(located.path)
        print(f"{located.path}: verified, every byte matches its checksum.", file=sys.stderr)
    return Summary.of(located.path)


def _show(summary: Summary, options: Options) -> int:
    names = summary.names(options.kind, options.tensors)
    rows = _rows(summary.rows(names, options.kind), len(names))
    if options.json:
        document = report.summary_document(summary) | {"kind": options.kind, "tensors": rows}
        print(json.dumps(document, indent=2))
    else:
        print(*report.summary_lines(summary), *report.table(rows), sep="\n")
    return EQUAL


def _compare(comparison: Comparison, as_json: bool) -> int:
    names = comparison.names()
    rows = _rows(comparison.rows(names), len(names.common))
    different = [row["name"] for row in rows if not row["equal"]]
    equal = names.same and not different
    if as_json:
        document = report.comparison_document(comparison, names)
        print(json.dumps(document | {"tensors": rows, "equal": equal}, indent=2))
    else:
        print(*report.comparison_lines(comparison, names), *report.table(rows), sep="\n")
        if equal:
            print("equal")
        else:
            print(f"different: the values of {len(different)} of {len(rows)} common tensors")
    return EQUAL if equal else DIFFERENT


def _rows(rows: Iterable[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    return list(tqdm(rows, total=total, unit="tensor", delay=1, disable=None, leave=False))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Exits with the error's exit code after printing its message.
    """
    with reporting_errors():
        options = tyro.cli(Options, args=arguments)
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
