"""What benchmarks share: dtypes by flag, inputs, checks, GPU timing, tables and the JSON file."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError, flag, not_positive
from megatron_ring.settings.precision import DTYPES as TRAINING_DTYPES

MIB = 2**20
DTYPES = {"fp64": torch.float64} | TRAINING_DTYPES


def device_name(device: str) -> str:
    """Return the GPU's name for "cuda", else "CPU"."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def layout_name(layout: Layout) -> str:
    """Return the name of a layout, with the stripe size if it is more than one token."""
    return f"{layout.name} by {layout.stripe_size}" if layout.stripe_size > 1 else layout.name


def commit() -> str:
    """Return the short hash of the checked-out commit, or "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def random_inputs(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: str,
    dtype: torch.dtype,
    batch: int = 1,
) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the output, each (batch, tokens, heads, head dim).

    They are standard normal and the same for the same arguments.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for h in (heads, kv_heads, kv_heads, heads):
        x = torch.randn((batch, tokens, h, head_dim), generator=generator, device=device)
        tensors.append(x.to(dtype))
    return tensors


def missing_gpu(device: str, effect_of_cpu: str) -> list[str]:
    """Return the problem of --device cuda where torch finds no GPU, else nothing.

    ``effect_of_cpu``: what the benchmark does with --device cpu, after "to".
    """
    if device != "cuda" or torch.cuda.is_available():
        return []
    return [f"device cuda: torch finds no GPU. Set --device cpu to {effect_of_cpu}."]


def elapsed_seconds(run: Callable[[], None], device: str) -> float:
    """Return the seconds of ``run``, with what it queues on a GPU; blocks until the end."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def compute_seconds(run: Callable[[], None], device: str) -> float:
    """Return the seconds of ``run``, which does not communicate; blocks until the end.

    On a CPU these are CPU seconds of this process, so that other load does not count.
    """
    if device == "cuda":
        return elapsed_seconds(run, device)
    start = time.process_time()
    run()
    return time.process_time() - start


def gpu_milliseconds(run: Callable[[], None]) -> float:
    """Return the milliseconds that the GPU takes for what ``run`` queues; blocks until the end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def size_problems(options: Any, *positive: str) -> list[str]:
    """Return what is wrong with the sizes of a benchmark's tensors.

    ``positive``: options that must be above 0, besides heads and kv_heads.
    """
    problems = not_positive(options, "heads", "kv_heads", *positive)
    if min(options.heads, options.kv_heads) > 0 and options.heads % options.kv_heads:
        problems.append(
            f"heads {options.heads} must be a multiple of kv_heads {options.kv_heads}. "
            "Set --heads or --kv-heads."
        )
    return problems


def ring_problems(options: argparse.Namespace, *positive: str) -> list[str]:
    """Return what is wrong with the sizes of a benchmark's ring.

    ``positive``: options that must be above 0, besides tokens, heads and kv_heads.
    """
    problems = size_problems(options, "tokens", *positive)
    if options.ranks < 2:
        problems.append(
            f"ranks {options.ranks} must be at least 2: a ring of 1 rank sends nothing. "
            "Set --ranks."
        )
    return problems


# ---- output ----


def table_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_head(titles: Sequence[str]) -> str:
    """Return the first two rows of a Markdown table whose columns are aligned right."""
    return f"{table_row(titles)}\n{table_row('---:' for _ in titles)}"


class Column(NamedTuple):
    """A column of a table in plain text, aligned right; ``meaning`` is for the legend."""

    title: str
    width: int
    digits: int
    meaning: str = ""


def plain_titles(columns: Mapping[str, Column]) -> str:
    """Return the first line of a table in plain text."""
    return "".join(f"{column.title:>{column.width}}" for column in columns.values())


def legend(columns: Mapping[str, Column]) -> str:
    """Return a line for each column that has a meaning, to be printed below the table."""
    lines = [f"  {column.title}: {column.meaning}" for column in columns.values() if column.meaning]
    return "\n".join(lines)


def plain_row(columns: Mapping[str, Column], row: Mapping[str, Any], missing: str = "") -> str:
    """Return one line of a table in plain text.

    Args:
        columns: Columns by their keys in ``row``.
        missing: Printed for a value that is None or absent.
    """
    cells = []
    for field, column in columns.items():
        value = row.get(field)
        text = missing if value is None else f"{value:.{column.digits}f}"
        cells.append(f"{text:>{column.width}}")
    return "".join(cells)


def check_outputs(**paths: str | Path) -> None:
    """Raise ConfigError if a file of results cannot be written; called before anything is measured.

    Creates the folders of the files. Args are the paths by the names of their options; an empty
    path is not written.
    """
    if problems := [
        f"{name} {path} cannot be written: {problem}. Set {flag(name)} to another file."
        for name, path in paths.items()
        if path and (problem := _output_problem(Path(path)))
    ]:
        raise ConfigError(problems)


def _output_problem(path: Path) -> str | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            return "it is a folder"
        if path.exists():
            return None if os.access(path, os.W_OK) else "no permission"
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return error.strerror or str(error)


def write_json(path: str, findings: dict[str, Any]) -> None:
    """Write ``findings`` to the file ``path``; do nothing if the path is empty.

    An interruption leaves the previous file or this one.
    """
    if not path:
        return
    text = json.dumps(findings, indent=2) + "\n"
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        target.write_text(text)  # a pipe or a device, as /dev/stdout
        return
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(target)


def setting(name: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return where and how the benchmark ``name`` runs, as its JSON file begins."""
    return {
        "benchmark": name,
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
        },
    }


class ResultsFile:
    """The JSON file of a benchmark, written anew after every row.

    A run that is interrupted so keeps what it has measured. Without a path nothing is written.

    Attributes:
        findings: The setting, and a list of rows for each part.
    """

    def __init__(self, path: str, setting: dict[str, Any]):
        check_outputs(json=path)
        self.findings = dict(setting)
        self._path = path
        self.write()

    def add(self, part: str, row: Any) -> None:
        """Append ``row`` to the rows of ``part``."""
        self.findings.setdefault(part, []).append(row)
        self.write()

    def write(self) -> None:
        """Write all findings; an interruption leaves the previous file or this one."""
        write_json(self._path, self.findings)
