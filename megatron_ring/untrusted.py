"""Bounded, validated reading of metadata that comes from outside this process.

A manifest, an index, a config or a state file may have been written by another program, damaged,
or crafted to do harm. Every such file is read here: only regular files, only up to a stated size,
only inside the folder that the user named, and only documents of the declared types, ranges and
depth. ``create`` and ``replace_file`` write such files without following links.

All functions raise ``UntrustedInputError`` with a short reason. The caller adds the file's name,
the remedy and the class of errors.py with ``errors_as``.
"""

import contextlib
import functools
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from megatron_ring.errors import MegatronRingError

MIB = 1 << 20
METADATA_BYTES = 64 * MIB
"""The default size limit of a metadata file."""

CONFIG_BYTES = MIB // 4
"""The size limit of a YAML config, which PyYAML parses in about two seconds."""

TOKENIZER_BYTES = 128 * MIB
"""The size limit of a tokenizer file; those of published models have up to 35 MB."""

LARGEST_INTEGER = 2**63 - 1
"""The largest magnitude of a whole number in YAML: the int64 range of torch and NumPy."""

_YAML_DEPTH = 50
_YAML_NODES = 100_000
_SHORT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_TEXT_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:value"}
_MERGE_TAG = "tag:yaml.org,2002:merge"
_LONGEST_NUMBER = 400
_SHOWN_PROBLEMS = 3
_SHOWN_CHARACTERS = 80

Schema = TypeVar("Schema")


class UntrustedInputError(ValueError):
    """Content that is invalid; the message is the reason, without the file's name."""


@contextlib.contextmanager
def errors_as(error: type[MegatronRingError], path: Path | str, remedy: str) -> Iterator[None]:
    """Turn UntrustedInputError and OSError into ``error`` with file name, reason and remedy.

    ``remedy`` is an instruction to the user, usually with a flag.
    """
    try:
        yield
    except UntrustedInputError as reason:
        raise error(f"{path} cannot be read: {reason}. {remedy}") from reason
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}. {remedy}") from reason


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Never blocks: a named pipe, a device, a socket or a folder is refused. Raises OSError where the
    file is missing or cannot be opened.
    """
    if "\0" in str(path):
        raise UntrustedInputError("its name has a NUL")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise UntrustedInputError("it is not a regular file")


def check_regular(path: Path) -> None:
    """Check the file as ``open_regular`` does, before a library opens it by its name."""
    os.close(open_regular(path))


def create(path: Path) -> BinaryIO:
    """Create a file for writing, replacing any file or link of that name.

    The target of such a link is never written. Raises OSError as open does.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "wb")


def replace_file(path: str | Path, content: bytes) -> None:
    """Write ``content`` under a temporary name beside ``path``, then rename it over ``path``.

    A reader finds the old file or the complete new one. Links of either name are replaced, not
    followed.
    """
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with create(temporary) as file:
        file.write(content)
    temporary.replace(path)


def read_bytes(path: Path, limit: int = METADATA_BYTES) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises OSError as open does.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # The file may grow between the two calls, so the read is bounded too.
        content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise UntrustedInputError(
            f"it has {max(size, len(content))} bytes, and the limit is {limit}"
        )
    return content


def parse_json(content: bytes, schema: type[Schema]) -> Schema:
    """Parse JSON and validate it strictly against a dataclass, a pydantic model or a typing form.

    Types are not converted, but JSON arrays become tuples and sets where the schema has those. The
    parser refuses nesting deeper than 200 and numbers of more than 4,300 digits.
    """
    try:
        return _adapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        raise UntrustedInputError(_describe(error)) from error


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object of which the caller validates only the keys that it uses.

    Infinity and NaN are accepted, since other programs write them.
    """
    try:
        document = from_json(content)
    except ValueError as error:
        raise UntrustedInputError(f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UntrustedInputError("it is not a JSON object of keys and values")
    return document


def validate(document: Any, schema: type[Schema]) -> Schema:
    """Validate an already parsed value strictly; types are not converted.

    For plain types and their containers only: in strict mode pydantic builds a dataclass from JSON
    alone, so use ``parse_json`` for those.
    """
    try:
        return _adapter(schema).validate_python(document, strict=True)
    except ValidationError as error:
        raise UntrustedInputError(_describe(error)) from error


def parse_yaml(content: bytes) -> Any:
    """Parse one YAML document of plain values (UTF-8, with or without a byte-order mark).

    Refuses deep nesting, aliases that expand to more than 100,000 nodes or to themselves, whole
    numbers beyond 64 bits, duplicate keys in a mapping, and every tag that would construct a Python
    object.
    """
    try:
        loader = _Loader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node_count(node)
        _check_repeated_keys(loader, node)
        document = loader.construct_document(node)
    except RecursionError as error:
        raise UntrustedInputError(f"it nests deeper than {_YAML_DEPTH} levels") from error
    except yaml.YAMLError as error:
        raise UntrustedInputError(f"it is not YAML: {_first_characters(error)}") from error
    except UntrustedInputError:
        raise
    # Not UTF-8, an impossible date, or a tag on text of another form ("!!int x"): PyYAML's
    # constructors let any Python error through.
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise UntrustedInputError(
            f"it has a value that cannot be read: {_first_characters(error)}"
        ) from error
    _check_integers(document)
    return document


def shown(value: Any) -> str:
    """Return ``repr(value)`` for a message, shortened if it is long."""
    return _SHORT_REPR.repr(value)


def path_inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` for a relative name that stays inside ``folder``.

    Refuses absolute names, "..", empty names and NUL. The file need not exist. Links are checked
    separately, by ``check_link``, because an index or a manifest contains the name alone.
    """
    parts = Path(name).parts
    if not parts or "\0" in name or Path(name).is_absolute() or ".." in parts:
        raise UntrustedInputError(f"{_shortened(name)} is not the name of a file inside the folder")
    return folder / name


def check_link(folder: Path, path: Path) -> None:
    """Refuse a path inside ``folder`` whose symbolic links lead out of it.

    Links from a ``snapshots`` folder to the ``blobs`` folder beside it are allowed, because
    Hugging Face's cache stores models that way.
    """
    root = folder.resolve()
    target = path.resolve()
    blobs = [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs[:1])):
        raise UntrustedInputError(
            f"{path.name} is a link to {target}, outside the folder. Copy the file into the folder"
        )


@functools.cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def _describe(error: ValidationError) -> str:
    """Describe the first problems, each with its location and the value, in bounded length."""
    problems = []
    for problem in error.errors(include_url=False)[:_SHOWN_PROBLEMS]:
        location = ".".join(str(part) for part in problem["loc"])
        value = _shortened(problem["input"])
        problems.append(f"{_shortened(location)}: {problem['msg']} (found {value})")
    more = error.error_count() - len(problems)
    return "; ".join(problems) + (f"; and {more} more" if more > 0 else "")


def _shortened(value: Any) -> str:
    """Return a bounded ``repr``: the start of text, only the type of other long values."""
    if isinstance(value, str | bytes):
        value = value[:_SHOWN_CHARACTERS]
    elif not isinstance(value, bool | float | None) and not _is_small_integer(value):
        return f"of type {type(value).__name__}"
    return repr(value)


def _first_characters(error: Exception) -> str:
    return str(error)[: 4 * _SHOWN_CHARACTERS]


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = _SHOWN_CHARACTERS
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if _is_small_integer(value) else f"a number of {value.bit_length()} bits"


_SHORT_REPR = _ShortRepr()


def _is_small_integer(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 10**_SHOWN_CHARACTERS


class _Loader(yaml.SafeLoader):
    """Stops at the first level too deep, because PyYAML's time per token grows with depth."""

    def increase_flow_level(self) -> None:
        super().increase_flow_level()
        if self.flow_level > _YAML_DEPTH:
            raise UntrustedInputError(f"it nests deeper than {_YAML_DEPTH} levels")


def _check_node_count(root: yaml.Node) -> None:
    """Refuse a YAML node graph that is too deep, too large with its aliases expanded, or cyclic.

    Sizes are computed once per node, children first and without recursion, so the cost is linear
    in the text however large its expansion is.
    """
    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        children = _children(node)
        if id(node) not in open_nodes and id(node) not in sizes:
            _check_length(node)
            open_nodes.add(id(node))
            for child in children:
                if id(child) in open_nodes:
                    raise UntrustedInputError("an alias contains itself")
            stack += [child for child in children if id(child) not in sizes]
            continue
        stack.pop()
        if id(node) in sizes:
            continue
        open_nodes.discard(id(node))
        sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
        depths[id(node)] = 1 + max((depths[id(child)] for child in children), default=0)
        if depths[id(node)] > _YAML_DEPTH:
            raise UntrustedInputError(f"it nests deeper than {_YAML_DEPTH} levels")
        if sizes[id(node)] > _YAML_NODES:
            raise UntrustedInputError(f"its aliases expand to more than {_YAML_NODES} values")


def _check_repeated_keys(loader: yaml.SafeLoader, root: yaml.Node) -> None:
    """Refuse a mapping with two equal scalar keys, of which PyYAML would use the last alone.

    Keys are compared as Python does after construction: 1 and 0x1 are equal. A mapping's own key
    may replace a merged one ("<<").
    """
    stack = [root]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack += _children(node)
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            name = key.value if key.tag in _TEXT_TAGS else loader.construct_object(key)
            line = key.start_mark.line + 1
            if name in lines:
                raise UntrustedInputError(
                    f"the key {shown(name)} is twice in one mapping, in lines {lines[name]} "
                    f"and {line}"
                )
            lines[name] = line


def _check_length(node: yaml.Node) -> None:
    """Refuse long numbers and dates, as PyYAML's time for a base-60 number is quadratic."""
    is_number = isinstance(node, yaml.ScalarNode) and node.tag in _SHORT_TAGS
    if is_number and len(node.value) > _LONGEST_NUMBER:
        raise UntrustedInputError(
            f"it has a number of {len(node.value)} characters, which cannot be read"
        )


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [side for pair in node.value for side in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_integers(document: Any) -> None:
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            stack += value
        elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise UntrustedInputError(
                f"it has a whole number of {value.bit_length()} bits, and the limit is 63"
            )
