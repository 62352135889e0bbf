"""What is told of a checkpoint, and of two side by side: lines of text for people, a dict for machines."""

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_ring.checkpoint.compare import Comparison, Names
from megatron_ring.checkpoint.summary import Summary, differing, settings
from megatron_ring.config import Config

_PARTS = "part-*.safetensors"


def described(summary: Summary) -> Iterator[str]:
    """All but the tensors: where the run was, the model, how it was made, the files."""
    state, model = summary.state, summary.config.model
    yield f"{summary.path}: {len(summary.files)} files, {sum(summary.files.values()):,} bytes"
    yield (
        f"step {state.step:,}: {state.consumed_samples:,} samples, {summary.consumed_tokens:,} tokens seen, "
        f"{state.optimizer_steps:,} optimizer steps"
    )
    yield (
        f"model: {summary.parameters:,} parameters, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} query and {model.key_value_heads} key-value heads of {model.head_dim}, "
        f"feed-forward {model.feed_forward_size}, vocabulary {state.vocab_size:,}"
    )
    yield f"kept of each parameter: {', '.join(summary.tensors.kinds)}"
    yield (
        f"made at {state.written_at or 'unknown'} (UTC), by commit {state.commit or 'unknown'}, "
        f"processes {state.processes or 'unknown'}"
    )
    changed = differing(summary.config, Config())
    yield from _listed(
        "config, where it is not the default",
        {key: repr(value) for key, (value, _) in changed.items()},
    )
    yield from _listed("files", _files(summary.files))
    if summary.other_files:
        yield f"in its folder, and no part of it: {', '.join(summary.other_files)}"


def document(summary: Summary) -> dict[str, Any]:
    """What ``described`` tells, for machines."""
    return asdict(summary.state) | {
        "checkpoint": str(summary.path),
        "consumed_tokens": summary.consumed_tokens,
        "parameters": summary.parameters,
        "kinds": list(summary.tensors.kinds),
        "config": settings(summary.config),
        "not_default": list(differing(summary.config, Config())),
        "files": summary.files,
        "other_files": summary.other_files,
    }


def compared(comparison: Comparison, names: Names) -> Iterator[str]:
    """All but the values: which options and which parameters differ."""
    a, b = comparison.a, comparison.b
    yield f"first: {a.path}, step {a.state.step:,}"
    yield f"second: {b.path}, step {b.state.step:,}"
    options = {
        key: f"{first!r} and {second!r}" for key, (first, second) in comparison.settings.items()
    }
    yield from _listed("config, where they differ", options)
    yield from (f"only in the first: {name}" for name in names.only_first)
    yield from (f"only in the second: {name}" for name in names.only_second)
    shapes = {
        name: [_cell(list(one.tensors.shapes[name])) for one in (a, b)] for name in names.reshaped
    }
    yield from (
        f"two shapes: {name} {first} and {second}" for name, (first, second) in shapes.items()
    )


def comparison_document(comparison: Comparison, names: Names) -> dict[str, Any]:
    """What ``compared`` tells, for machines."""
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
    """A line of titles and one of each row, in columns, the first of which are names."""
    cells = [[title.replace("_", " ") for title in row] for row in rows[:1]]
    cells += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *others in cells:
        yield name.ljust(widths[0]) + "".join(
            f"  {cell:>{width}}" for cell, width in zip(others, widths[1:])
        )


def _files(sizes: dict[str, int]) -> dict[str, str]:
    """The parts, of which there are as many as processes, in one line."""
    parts = fnmatch.filter(sizes, _PARTS)
    others = {name: f"{sizes[name]:,} bytes" for name in sorted(sizes.keys() - set(parts))}
    return others | {_PARTS: f"{len(parts)} files, {sum(map(sizes.get, parts)):,} bytes"}


def _listed(title: str, entries: dict[str, str]) -> Iterator[str]:
    yield f"{title}:" if entries else f"{title}: nowhere"
    yield from (f"  {key}: {value}" for key, value in entries.items())


def _cell(value: Any) -> str:
    return _FORMATS.get(type(value), str)(value)


_FORMATS = {
    bool: lambda value: "yes" if value else "no",
    float: "{:.6g}".format,
    int: "{:,}".format,
    list: lambda shape: "x".join(map(str, shape)),
    type(None): lambda _: "-",
}
