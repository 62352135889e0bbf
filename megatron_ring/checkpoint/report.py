"""Reports on one checkpoint and on a comparison of two, as lines of text and as JSON documents."""

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_ring.checkpoint.compare import ComparedNames, Comparison
from megatron_ring.checkpoint.summary import Summary, differing_options, options
from megatron_ring.config import Config
from megatron_ring.errors import counted

_PARTS = "part-*.safetensors"


def summary_lines(summary: Summary) -> Iterator[str]:
    """Yield lines on everything but the tensors: progress, model, provenance and files."""
    state = summary.state
    model = summary.config.model
    files = counted(len(summary.files), "file")
    yield f"{summary.path}: {files}, {sum(summary.files.values()):,} bytes"
    yield (
        f"step {state.step:,}: {counted(state.consumed_samples, 'sample', ',')}, "
        f"{counted(summary.consumed_tokens, 'token', ',')} seen, "
        f"{counted(state.optimizer_steps, 'optimizer step', ',')}"
    )
    yield (
        f"model: {summary.parameters:,} parameters, {counted(model.num_layers, 'layer')}, "
        f"hidden size {model.hidden_size}, {model.num_attention_heads} query and "
        f"{model.key_value_heads} key-value heads of {model.head_dim}, "
        f"feed-forward {model.feed_forward_size}, vocabulary {state.vocab_size:,}"
    )
    yield f"stored for each parameter: {', '.join(summary.tensors.kinds)}"
    yield (
        f"written at {state.written_at or 'unknown'} (UTC), by commit {state.commit or 'unknown'}, "
        f"processes {state.processes or 'unknown'}"
    )
    changed = differing_options(summary.config, Config())
    yield from _section(
        "options that differ from their defaults",
        {key: repr(value) for key, (value, _) in changed.items()},
    )
    yield from _section("files", _files(summary.files))
    if summary.other_files:
        yield f"in its folder, but not part of it: {', '.join(summary.other_files)}"


def summary_document(summary: Summary) -> dict[str, Any]:
    """Return the content of ``summary_lines`` as a JSON document."""
    return asdict(summary.state) | {
        "checkpoint": str(summary.path),
        "consumed_tokens": summary.consumed_tokens,
        "parameters": summary.parameters,
        "kinds": list(summary.tensors.kinds),
        "config": options(summary.config),
        "not_default": list(differing_options(summary.config, Config())),
        "files": summary.files,
        "other_files": summary.other_files,
    }


def comparison_lines(comparison: Comparison, names: ComparedNames) -> Iterator[str]:
    """Yield lines on everything but the values: the options and parameters that differ."""
    first = comparison.a
    second = comparison.b
    yield f"first: {first.path}, step {first.state.step:,}"
    yield f"second: {second.path}, step {second.state.step:,}"
    changed = {key: f"{a!r} and {b!r}" for key, (a, b) in comparison.settings.items()}
    yield from _section("options that differ", changed)
    for name in names.only_first:
        yield f"only in the first: {name}"
    for name in names.only_second:
        yield f"only in the second: {name}"
    for name in names.reshaped:
        shape_a = _cell(list(first.tensors.shapes[name]))
        shape_b = _cell(list(second.tensors.shapes[name]))
        yield f"two shapes: {name} {shape_a} and {shape_b}"


def comparison_document(comparison: Comparison, names: ComparedNames) -> dict[str, Any]:
    """Return the content of ``comparison_lines`` as a JSON document."""
    return {
        "first": str(comparison.a.path),
        "second": str(comparison.b.path),
        "kind": comparison.kind,
        "config": comparison.settings,
        "only_first": names.only_first,
        "only_second": names.only_second,
        "two_shapes": names.reshaped,
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of titles and one for each row, in columns; the first column has the names."""
    cells = [[title.replace("_", " ") for title in row] for row in rows[:1]]
    cells += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *others in cells:
        columns = [f"  {cell:>{width}}" for cell, width in zip(others, widths[1:])]
        yield name.ljust(widths[0]) + "".join(columns)


def _files(sizes: dict[str, int]) -> dict[str, str]:
    """Return the size of each file, with all parts in one line: there is one for each process."""
    parts = fnmatch.filter(sizes, _PARTS)
    lines = {name: f"{sizes[name]:,} bytes" for name in sorted(sizes.keys() - set(parts))}
    total = sum(sizes[part] for part in parts)
    return lines | {_PARTS: f"{counted(len(parts), 'file')}, {total:,} bytes"}


def _section(title: str, entries: dict[str, str]) -> Iterator[str]:
    yield f"{title}:" if entries else f"{title}: none"
    for key, value in entries.items():
        yield f"  {key}: {value}"


def _cell(value: Any) -> str:
    return _FORMATS.get(type(value), str)(value)


_FORMATS = {
    bool: lambda value: "yes" if value else "no",
    float: "{:.6g}".format,
    int: "{:,}".format,
    list: lambda shape: "x".join(map(str, shape)),
    type(None): lambda _: "-",
}
