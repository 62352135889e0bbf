"""Write the support matrix of the attention kernels, from the table that the program itself reads.

python -m benchmarks.support_matrix --output docs/support.md
"""

from pathlib import Path

import tyro

from benchmarks.common import table_row
from megatron_ring.errors import reporting_errors
from megatron_ring.kernels.attention.registry import COLUMNS, SUPPORT
from megatron_ring.kernels.selection import Cell, Unsupported

_INTRODUCTION = """# What each attention kernel supports

Written by `benchmarks/support_matrix.py` from `megatron_ring/kernels/attention/registry.py`. The
program reads this table before a run starts: if the run needs a feature that its kernel does not
support, it ends with exit code 5 and the message below the table.

| cell | meaning |
| --- | --- |
| tested | a parity test with a float64 oracle on this type of device |
| interpreted | a parity test in Triton's interpreter, also compiled, never run on such a device |
| unproven | its calls match the library's signatures, never run on such a device |
| refused | see the note with this number |

A run that relies on an interpreted or unproven cell prints a warning. If a package, version or
compute capability that a kernel requires is missing, the message names it.
"""


def main(output: Path = Path("docs/support.md")) -> None:
    """Write the matrix as Markdown.

    Args:
        output: The file to write.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(matrix())
    print(f"wrote {output}")


def matrix() -> str:
    """Format the page: introduction, table, and a note with reason and alternative per refusal."""
    refusals: list[Unsupported] = []
    header = ["feature", *(f"{kernel} on {device}" for kernel, device in COLUMNS)]
    rows = [header, ["---"] * len(header)]
    for feature, cells in SUPPORT.items():
        rows.append([feature.value, *(_word(cell, refusals) for cell in cells.values())])
    table = [table_row(row) for row in rows]
    notes = [f"{n}. {refused.reason}. {refused.instead}." for n, refused in enumerate(refusals, 1)]
    return "\n".join([_INTRODUCTION, *table, "", *notes, ""])


def _word(cell: Cell, refusals: list[Unsupported]) -> str:
    """Return the word for a cell; add a refusal to ``refusals`` and append its number."""
    if not isinstance(cell, Unsupported):
        return cell.value
    if cell not in refusals:
        refusals.append(cell)
    return f"refused ({refusals.index(cell) + 1})"


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
