"""Write docs/reference/options.md: every option with its values, default and help.

python tools/write_option_reference.py --output docs/reference/options.md
"""

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import ast
import inspect
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from megatron_ring import config
from megatron_ring.errors import flag, reporting_errors

_INTRODUCTION = """\
# Options

Written by `tools/write_option_reference.py` from `megatron_ring/config/`. An option has one name:
a key of its section in the YAML file of `--config`, and a flag. YAML overrides the defaults, flags
override YAML. A flag that is on or off has a negative form, such as `--no-sequence-parallel`.
Programs that use a trained model have flags only; they are at the end.
"""
_PROGRAM = "The program"

# Options of other programs than pretrain_gpt.py, which have flags only.
_OF_TOOLS = (
    ("Inference: the model", config.InferenceConfig),
    ("Inference: `tools/generate.py`", config.GenerationConfig),
    ("Evaluation: `tools/evaluate.py positions`", config.PositionsConfig),
    ("Evaluation: `tools/evaluate.py needles`", config.NeedlesConfig),
)


def main(output: Path = Path("docs/reference/options.md")) -> None:
    """Write the reference.

    Args:
        output: The file to write.
    """
    output.write_text(reference())
    print(f"wrote {output}")


def reference() -> str:
    """Return the page as Markdown."""
    sections = [
        (f"Section `{field.name}`", type(value))
        for field in fields(config.Config)
        if is_dataclass(value := getattr(config.Config(), field.name))
    ]
    tables = [
        _table(title, section)
        for title, section in ((_PROGRAM, config.Config), *sections, *_OF_TOOLS)
    ]
    return "\n".join([_INTRODUCTION, *tables])


def _table(title: str, section: type) -> str:
    hints = get_type_hints(section)
    texts = _help_texts(section)
    rows = [
        f"| {_name(field.name, hints[field.name])} | {_values(hints[field.name])} "
        f"| {_default(value)} | {_cell(texts[field.name])} |"
        for field in fields(section)
        if not is_dataclass(value := getattr(section(), field.name))
    ]
    header = ["| option | values | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", *header, *rows, ""])


def _help_texts(section: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, on one line."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    texts = {}
    for field, text in zip(definition.body, definition.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def _name(name: str, hint: Any) -> str:
    """Return the flag of an option, or its key where it has none."""
    return f"`{name}` (YAML only)" if get_origin(hint) is dict else f"`{flag(name)}`"


def _values(hint: Any) -> str:
    origin = get_origin(hint)
    inner = get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (types.UnionType, Union):
        return " or ".join(dict.fromkeys(map(_values, inner)))
    if origin is tuple:
        count = "any number of" if Ellipsis in inner else str(len(inner))
        return f"{count} {_values(inner[0])}"
    if origin is dict:
        return "keys and values"
    return {bool: "on or off", int: "integer", float: "number", str: "text"}[hint]


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"`{item}`" for item in value) or "none"
    return "none" if value in ("", {}) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
