"""Write what each attention kernel does and does not do, from the table that the program itself asks.

python -m benchmarks.support_matrix --output docs/support.md
"""

from pathlib import Path

import tyro

from megatron_ring.errors import reporting_errors
from megatron_ring.kernels.attention.support import (
    COLUMNS,
    SUPPORT,
    Support,
    Unsupported,
    Validation,
)

_OPENING = """# What each attention kernel does

Written by `benchmarks/support_matrix.py` from `megatron_ring/kernels/attention/support.py`,
which the program checks before it starts: a feature that the run needs and its kernel does not
support ends it with exit code 5. *tested* has a parity test with a float64
oracle behind it; *interpreted* has one in Triton's interpreter, is compiled in a test, and has never run on such a
device; *unproven* is written, held in tests to what its library asks and answers, and has never run there either. A
run that relies on one of these two says so. A package, version or compute capability that a kernel lacks is named too.
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
    """The table, and under it every refusal with its reason and what to do instead."""
    refusals: list[Unsupported] = []
    header = ["feature", *(f"{kernel} on {device}" for kernel, device in COLUMNS)]
    rows = [
        [feature.value, *(_word(cell, refusals) for cell in cells.values())]
        for feature, cells in SUPPORT.items()
    ]
    table = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    notes = [f"{n}. {refused.reason}. {refused.instead}." for n, refused in enumerate(refusals, 1)]
    return "\n".join([_OPENING, *table, "", *notes, ""])


def _word(cell: Support, refusals: list[Unsupported]) -> str:
    """One word for a cell; a refusal gets the number of its note."""
    if isinstance(cell, Validation):
        return {
            Validation.TESTED: "tested",
            Validation.INTERPRETED: "interpreted",
            Validation.UNPROVEN: "unproven",
        }[cell]
    if cell not in refusals:
        refusals.append(cell)
    return f"refused ({refusals.index(cell) + 1})"


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
