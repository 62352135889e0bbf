"""Turn the JSON files of the GPU benchmarks into tables of results and lines of measured.py.

    python -m benchmarks.report_gpu gpu-results            # print all
    python -m benchmarks.report_gpu gpu-results --write    # and edit the documents and measured.py

Reads what ``make bench-gpu``, ``make bench-step`` and ``make tune-gpu`` have written into one
folder; files that are not there, and rows that were not measured, are left out. Prints the table of
results in Markdown, the lines of megatron_ring/kernels/attention/measured.py, from which
``--attention-kernel auto`` and ``--stripe-size auto`` choose on this device, and those of
megatron_ring/kernels/attention/triton/blocks.py. With --write the table replaces what is between
the two markers of docs/benchmarks/gpu.md, its rows with a target what is between those of
README.md, and the lines replace those of the same device and case in measured.py; others stay. Tile
sizes are only printed, because tests must accept them first.

Runs anywhere: it needs no GPU.
"""

import argparse
import ast
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import DTYPES, table_row
from megatron_ring.errors import DataError, reporting_errors

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GPU_DOCUMENT = ROOT / "docs" / "benchmarks" / "gpu.md"
MEASURED = ROOT / "megatron_ring" / "kernels" / "attention" / "measured.py"
BEGIN = "<!-- begin: written by benchmarks/report_gpu.py -->"
END = "<!-- end: written by benchmarks/report_gpu.py -->"
FILES = {
    "bench_gpu": "bench-gpu.json",
    "bench_step": "bench-step.json",
    "tune_blocks": "tune-blocks.json",
}
# The ranks of the emulated rings from which lines and figures are taken.
RANKS = 8
LINE_LENGTH = 100
DEFAULT_HEAD_DIM = 128

Findings = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with the JSON files")
    parser.add_argument("--write", action="store_true", help="edit documents and measured.py")
    options = parser.parse_args()
    found = read(options.folder)
    print(table(found))
    bench = found.get("bench_gpu", {})
    lines = {"MEASURED": measured_lines(bench), "MEASURED_STRIPES": stripe_lines(bench)}
    for name, of_table in lines.items():
        print(f"\nfor {name} in {MEASURED.relative_to(ROOT)}", *of_table, sep="\n")
    if "tune_blocks" in found:
        print(
            "\nfor kernels/attention/triton/blocks.py", *block_lines(found["tune_blocks"]), sep="\n"
        )
    if options.write:
        for document, only_targets in ((GPU_DOCUMENT, False), (README, True)):
            text = replace_between_markers(document.read_text(), table(found, only_targets))
            document.write_text(text)
        source = MEASURED.read_text()
        for name, of_table in lines.items():
            source = replace_lines(source, name, of_table)
        MEASURED.write_text(source)


# Keys of every file, of those that ``common.setting`` writes.
SETTING = {"device", "commit", "command", "options"}


def read(folder: Path) -> dict[str, Findings]:
    """Return the findings of the benchmarks whose files are in ``folder``, by benchmark.

    Raises DataError if there are none, or one is not a benchmark's.
    """
    found = {}
    for name, file in FILES.items():
        path = folder / file
        if not path.exists():
            continue
        try:
            found[name] = json.loads(path.read_text())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        if not (isinstance(found[name], dict) and found[name].keys() >= SETTING):
            raise DataError(
                f"{path} is not written by {name}: it must be an object with the keys "
                f"{', '.join(sorted(SETTING))}. Run the benchmark again."
            )
    if not found:
        raise DataError(
            f"{folder} has none of {', '.join(FILES.values())}. Run make bench-gpu, make "
            "bench-step or make tune-gpu first."
        )
    return found


# ---- the table of results ----


NO_TARGET = "-"


def table(found: dict[str, Findings], only_targets: bool = False) -> str:
    """Return the table of results in Markdown, with one figure in each row.

    ``only_targets`` leaves out the figures that have no target.
    """
    rows = [
        [*row, bench["device"].removeprefix("NVIDIA "), f"`{bench['command']}` ({bench['commit']})"]
        for name, figures in (("bench_gpu", bench_figures), ("bench_step", step_figures))
        if (bench := found.get(name))
        for row in figures(bench)
        if not (only_targets and row[2] == NO_TARGET)
    ]
    titles = ["what", "figure", "target", "device", "command (commit)"]
    return "\n".join([table_row(titles), table_row("---" for _ in titles), *map(table_row, rows)])


def bench_figures(bench: Findings) -> Iterator[tuple[str, str, str]]:
    """Yield (what, figure, target) of the kernels and of emulated rings."""
    correct = bench.get("correctness", [])
    if correct:
        right = sum(row["correct"] for row in correct)
        what = "kernels, layouts and masks equal to float64 within the tolerance"
        yield what, f"{right}/{len(correct)}", f"{len(correct)}/{len(correct)}"
    layouts = bench.get("layouts", [])
    for tokens in dict.fromkeys(row["tokens"] for row in layouts):
        of_size = [row for row in layouts if row["tokens"] == tokens]
        single = [row for row in of_size if row["ranks"] == 1]
        for direction in ("forward", "backward"):
            for kernel in dict.fromkeys(("triton", _fastest(single))):
                for row in single:
                    if row["kernel"] == kernel:
                        what = f"{kernel}, {direction}, one document of {tokens:,}, TFLOP/s"
                        yield what, f"{row[f'{direction}_tflops']:.0f}", NO_TARGET
        ring = [row for row in of_size if row["ranks"] == RANKS]
        striped = _best(ring, "of_single", lambda row: row["layout"].startswith("striped"))
        zigzag = _best(ring, "of_single", lambda row: row["layout"] == "zigzag")
        where = f"{RANKS} emulated ranks of {tokens:,} tokens"
        if striped:
            what = f"{striped['layout']} ({striped['kernel']}) over the best on one GPU, {where}"
            yield what, f"{striped['of_single']:.2f}", "1.05"
        if zigzag:
            what = f"zigzag ({zigzag['kernel']}) over the best on one GPU, {where}"
            yield what, f"{zigzag['of_single']:.2f}", NO_TARGET
    packs = bench.get("packs", [])
    for tokens in dict.fromkeys(row["tokens"] for row in packs):
        own = [row for row in packs if row["tokens"] == tokens]
        if best := _best(own, "over_ring", lambda row: row["documents"] == "applied"):
            what = f"pack of {tokens:,} tokens, {best['layout']} ({best['kernel']}), over a ring "
            what += f"that ignores documents, {RANKS} emulated ranks"
            yield what, f"{best['over_ring']:.2f}", "4"
        if placed := _best(own, "over_ring", lambda row: row["documents"] == "placed"):
            what = (
                f"pack of {tokens:,} tokens, documents placed by size ({placed['kernel']}), over "
            )
            what += f"a ring that ignores documents, {RANKS} emulated ranks"
            yield what, f"{placed['over_ring']:.2f}", "5"


def step_figures(bench: Findings) -> Iterator[tuple[str, str, str]]:
    """Yield (what, figure, target) of a training step."""
    rows = {row["variant"]: row for row in bench.get("variants", []) if "error" not in row}
    options = bench["options"]
    step = f"Llama of {options['layers']} layers, {options['tokens']:,} tokens"
    names = {
        "default": "",
        "torch": ", torch's operations",
        "documents": ", packed documents",
        "transformers": ", transformers",
    }
    for name, row in rows.items():
        yield f"{step}{names[name]}: tokens/s", f"{row['tokens_per_second']:,.0f}", NO_TARGET
        if row["share_of_peak"] is not None and name != "transformers":
            target = "51%" if name == "default" else NO_TARGET
            yield (
                f"{step}{names[name]}: share of peak FLOP/s",
                f"{row['share_of_peak']:.1%}",
                target,
            )
    if "default" in rows:
        row = rows["default"]
        if row["peak_gib"] is not None:
            yield f"{step}: peak memory, GiB", f"{row['peak_gib']:.1f}", NO_TARGET
        for kind, milliseconds in row["split_ms"].items():
            target = "100" if kind == "element-wise" else NO_TARGET
            yield f"{step}: {kind}, ms of {row['step_ms']:.0f}", f"{milliseconds:.0f}", target


def _fastest(single: Sequence[dict[str, Any]]) -> str:
    best = _best(single, "of_single", lambda row: True)
    return best["kernel"] if best else ""


def _best(rows: Iterable[dict[str, Any]], figure: str, matches) -> dict[str, Any] | None:
    return max(filter(matches, rows), key=lambda row: row[figure], default=None)


def replace_between_markers(text: str, table: str) -> str:
    """Return ``text`` with the table between its markers; raises DataError without markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"the document must have the lines {BEGIN} and {END}, in this order.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


# ---- lines of measured.py ----


def measured_lines(bench: Findings) -> list[str]:
    """Return the lines of MEASURED: the times of the kernels, by dtype and mask."""
    cases = itertools.groupby(bench.get("orders", []), lambda row: (row["dtype"], row["mask"]))
    head_dim = bench["options"]["head_dim"] if bench else DEFAULT_HEAD_DIM
    lines = []
    for (dtype, mask), rows in cases:
        times = ", ".join(f'"{row["kernel"]}": {row["ms"]:.4g}' for row in rows)
        arguments = [f'"{bench["device"]}"', str(DTYPES[dtype]), f"MaskKind.{mask}"]
        arguments += [f"{{{times}}}", _source(bench)]
        arguments += [str(head_dim)] if head_dim != DEFAULT_HEAD_DIM else []
        lines.append(_call("Measured", arguments))
    return lines


def stripe_lines(bench: Findings) -> list[str]:
    """Return the lines of MEASURED_STRIPES: the speeds of stripe sizes, by kernel and mask.

    Of the first number of tokens per rank, and of the first pack.
    """
    speeds: dict[tuple[str, str], dict[str, float]] = {}
    layouts = bench.get("layouts", [])
    packs = bench.get("packs", [])
    for row in layouts:
        if row["ranks"] == RANKS and row["tokens"] == layouts[0]["tokens"]:
            stripes = _stripe_size(row["layout"], row["tokens"])
            if stripes:
                speeds.setdefault((row["kernel"], "CAUSAL"), {})[stripes] = row["of_single"]
    for row in packs:
        if row["documents"] == "applied" and row["tokens"] == packs[0]["tokens"]:
            stripes = _stripe_size(row["layout"], row["tokens"] // RANKS)
            if stripes:
                speeds.setdefault((row["kernel"], "SPARSE"), {})[stripes] = row["over_ring"]
    lines = []
    for (kernel, mask), by_size in sorted(speeds.items(), key=lambda item: item[0][1]):
        entries = ", ".join(f"{size}: {speed:.3f}" for size, speed in by_size.items())
        arguments = [f'"{bench["device"]}"', f'"{kernel}"', f"MaskKind.{mask}", f"{{{entries}}}"]
        lines.append(_call("MeasuredStripes", [*arguments, _source(bench)]))
    return lines


def _stripe_size(layout: str, tokens_per_rank: int) -> str:
    """Return the key of a layout in the speeds of stripe sizes; "" for a layout without stripes.

    Two stripes per rank have zigzag's positions.
    """
    if layout == "zigzag":
        return "WIDEST"
    name, _, size = layout.partition(" by ")
    if name != "striped":
        return ""
    return "WIDEST" if int(size or 1) * 2 == tokens_per_rank else size or "1"


def _source(bench: Findings) -> str:
    return f'"commit {bench["commit"]}, torch {bench["torch"]}"'


def _call(name: str, arguments: list[str]) -> str:
    """Return a call as an element of a table, in the formatter's style."""
    line = f"    {name}({', '.join(arguments)}),"
    if len(line) <= LINE_LENGTH:
        return line
    in_one_line = f"        {', '.join(arguments)}"
    if len(in_one_line) <= LINE_LENGTH:
        return f"    {name}(\n{in_one_line}\n    ),"
    return "\n".join(
        [f"    {name}(", *(f"        {argument}," for argument in arguments), "    ),"]
    )


def replace_lines(source: str, table: str, lines: Sequence[str]) -> str:
    """Return the module ``source`` with ``lines`` in its tuple ``table``.

    Elements for the same device and case, which are all arguments that are constants or names of
    torch and MaskKind, are removed. Raises DataError if there is no such tuple.
    """
    tuples = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == [table]
        and isinstance(node.value, ast.Tuple)
    ]
    if len(tuples) != 1:
        raise DataError(f"measured.py must have one tuple {table}, and has {len(tuples)}.")
    (elements,) = tuples
    new = {_case(ast.parse(line.strip().rstrip(","), mode="eval").body) for line in lines}
    replaced = [element for element in elements.elts if _case(element) in new]
    of_source = source.splitlines()
    last = elements.end_lineno - 1  # the line of the closing parenthesis
    removed = {
        number for element in replaced for number in range(element.lineno - 1, element.end_lineno)
    }
    kept = [line for number, line in enumerate(of_source[:last]) if number not in removed]
    return "\n".join([*kept, *lines, *of_source[last:]]) + "\n"


def _case(element: ast.expr) -> tuple[str, ...]:
    """Return the arguments of a line that say what was measured, without results and source.

    These come before the dictionary of results; the head dim comes after it.
    """
    assert isinstance(element, ast.Call)
    arguments = [ast.unparse(argument) for argument in element.args]
    head_dim = arguments[5] if len(arguments) > 5 else str(DEFAULT_HEAD_DIM)
    return (*arguments[:3], head_dim)


# ---- lines of blocks.py ----


def block_lines(tune: Findings) -> Iterator[str]:
    """Yield the part of the table of tile sizes that was measured, by kernel and head dim."""
    yield f'    "{tune["generation"]}": {{'
    for kernel, rows in itertools.groupby(tune.get("blocks", []), lambda row: row["kernel"]):
        entries = (
            f"{row['head_dim']}: Blocks({', '.join(map(str, row['blocks']))})" for row in rows
        )
        yield f'        "{kernel}": {{{", ".join(entries)}}},'
    yield "    },"


if __name__ == "__main__":
    with reporting_errors():
        main()
