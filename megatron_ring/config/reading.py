"""Reading and writing a config: command line and YAML.

Files are not trusted: untrusted.py bounds their size, depth and numbers, and refuses duplicate
keys. Values are validated strictly by pydantic against the types of the fields; unknown keys are
reported with the nearest known name.
"""

import difflib
import sys
import warnings
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from megatron_ring import flag_hints, untrusted
from megatron_ring.config.data import parse_shares
from megatron_ring.config.model import parse_window
from megatron_ring.config.schema import Config
from megatron_ring.errors import ConfigError

# Options that have other forms than their type, in YAML as on the command line.
_PARSERS = {"split": parse_shares, "window_size": parse_window}

# Nearest names are searched for the first unknown keys only, and for their first characters only,
# because the search takes time.
_MAX_SUGGESTIONS = 30
_MAX_KEY_CHARACTERS = 100

# typing represents ``int | str`` by the first, and ``int | Literal[...]`` by the second.
_UNIONS = (UnionType, Union)

Options = TypeVar("Options")


def parse(arguments: list[str], console: bool = True) -> Config:
    """Parse the command line over the YAML file that it names.

    Raises ConfigError for a bad file. A bad flag ends the program with exit code 2; with
    ``console`` the error, similar flags, and this package's names for flags of Megatron and of
    transformers are printed.
    """
    path = _config_path(arguments)
    return parse_flags(load_yaml(path) if path else Config(), arguments, console)


def parse_flags(defaults: Options, arguments: list[str], console: bool = True) -> Options:
    """Parse the command line over ``defaults``, a dataclass of options or of sections of options.

    Exits as ``parse`` does for a bad flag.
    """
    kind = type(defaults)
    flags = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(tyro.conf.AvoidSubcommands[kind])
    try:
        with warnings.catch_warnings():
            # tyro cannot check pydantic's recursive JsonValue; load_yaml has validated the values.
            warnings.filterwarnings("ignore", message="Skipping type check against")
            return tyro.cli(
                flags,
                default=defaults,
                args=arguments,
                description=kind.__doc__,
                console_outputs=console,
            )
    except SystemExit as leaving:
        if leaving.code and console:
            _print_hints(arguments)
        raise


def _config_path(arguments: list[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return ""


def _print_hints(arguments: list[str]) -> None:
    for argument in dict.fromkeys(arguments):
        if argument.startswith("--") and (hint := flag_hints.hint(argument)):
            print(hint, file=sys.stderr, flush=True)


def load_yaml(path: str | Path, remedy: str = "Set --config.") -> Config:
    """Read a YAML config; ``remedy`` ends the message about an unreadable file.

    Raises ConfigError that lists every key that is unknown, of the wrong type or out of range.
    """
    with untrusted.errors_as(ConfigError, f"config {path}", remedy):
        tree = untrusted.parse_yaml(untrusted.read_bytes(Path(path), untrusted.CONFIG_BYTES)) or {}
    problems: list[str] = []
    config = _merge(Config(), tree, str(path), problems)
    problems += [f"{path}: {problem}" for problem in config.unusable_values()]
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: Config) -> str:
    """Return the sections of the config as YAML that ``load_yaml`` reads."""
    sections = {name: value for name, value in asdict(config).items() if isinstance(value, dict)}
    return yaml.safe_dump(_tuples_to_lists(sections), sort_keys=False)


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _merge(section: Any, tree: Any, where: str, problems: list[str]) -> Any:
    """Return ``section`` with the values of ``tree``; appends to ``problems`` what does not fit."""
    if tree is None:
        return section  # a heading with nothing below it
    if not isinstance(tree, dict):
        problems.append(f"{where}: expected keys and values, found {untrusted.shown(tree)}.")
        return section
    hints = get_type_hints(type(section))
    known = [option.name for option in fields(section)]
    changed = {}
    for key, value in tree.items():
        if key not in known:
            suggestion = _suggestion(str(key), known) if len(problems) < _MAX_SUGGESTIONS else ""
            problems.append(f"{where}: unknown key {untrusted.shown(key)}.{suggestion}")
        elif is_dataclass(inner := getattr(section, key)):
            changed[key] = _merge(inner, value, f"{where}: {key}", problems)
        else:
            try:
                changed[key] = _convert(_PARSERS.get(key, _same)(value), hints[key])
            except (OverflowError, TypeError, ValueError):
                problems.append(
                    f"{where}: {key} is {untrusted.shown(value)}, not {_describe(hints[key])}."
                )
    return replace(section, **changed)


def _same(value: Any) -> Any:
    return value


def _convert(value: Any, hint: Any) -> Any:
    """Convert a value of YAML to ``hint``; raises ValueError, TypeError or OverflowError."""
    is_number = isinstance(value, int | str) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)  # YAML 1.1 reads 3e-4 as text
    is_union = get_origin(hint) in _UNIONS
    if is_union and float in get_args(hint) and is_number and value not in _choices(hint):
        return float(value)
    if get_origin(hint) is tuple:
        value = tuple(value) if isinstance(value, list) else (value,)
    converted = untrusted.validate(value, hint)
    if get_origin(hint) is Literal and type(converted) is not type(value):
        raise TypeError  # pydantic accepts True and 1.0 for Literal[1]
    return converted


def _choices(hint: Any) -> list[Any]:
    """Return the values of the Literal in a union such as ``float | Literal["auto"]``."""
    literals = [inner for inner in get_args(hint) if get_origin(inner) is Literal]
    return [choice for literal in literals for choice in get_args(literal)]


def _describe(hint: Any) -> str:
    """Describe a type in an error message."""
    if get_origin(hint) in _UNIONS:
        return " or ".join(_describe(inner) for inner in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        count = "" if Ellipsis in inner else f"{len(inner)} "
        return f"a list of {count}{inner[0].__name__}"
    return f"of type {getattr(hint, '__name__', hint)}"


def _suggestion(key: str, known: list[str]) -> str:
    """Return a hint for an unknown key: this package's name for it, or the nearest name."""
    if hint := flag_hints.hint(key):
        return f" {hint}"
    qualified = {name: name for name in known}
    for section in fields(Config):
        if is_dataclass(section.type):
            for option in fields(section.type):
                qualified.setdefault(option.name, f"{section.name}.{option.name}")
    nearest = difflib.get_close_matches(key[:_MAX_KEY_CHARACTERS], qualified, n=1)
    if not nearest:
        return f" Known here: {', '.join(known)}."
    return f" Did you mean {qualified[nearest[0]]}?"
