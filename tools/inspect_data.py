"""Show and verify a token store from the command line: index, tokens, manifest and tokenizer."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro

from megatron_ring.data.inspection import draw_histogram, verify
from megatron_ring.data.manifest import check_tokenizer, read_manifest, tokenizer_path
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import ConfigError, counted, reporting_errors

# Documents shown where --documents names none.
_DOCUMENTS_SHOWN = 3


@dataclass(frozen=True)
class Options:
    """Show the manifest, the lengths and some documents of the store P.bin and P.idx."""

    prefix: Annotated[Path, tyro.conf.Positional]
    """P: the store, without a suffix."""
    documents: tuple[int, ...] = ()
    """Numbers of the documents to show, counted from 0. Empty: the first 3."""
    characters: int = 1000
    """Characters to show of each document; the number of the others is shown."""
    tokenizer_model: str = ""
    """The tokenizer the store was written with. Empty: the one in the store's folder."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read every token, and check index, manifest and tokenizer against one another."""


def run(options: Options) -> None:
    """Print what ``options`` select.

    Raises ConfigError for a document number out of range, and DataError for a store that cannot be
    read.
    """
    store = TokenStore(options.prefix)
    tokenizer = Tokenizer.load(options.tokenizer_model or tokenizer_path(options.prefix))
    check_tokenizer(options.prefix, tokenizer)
    _refuse_invalid(options, len(store))
    _print_counts(store)
    if options.verify:
        _verify(store, tokenizer)
    for number in options.documents or range(min(_DOCUMENTS_SHOWN, len(store))):
        _print_document(store, number, tokenizer, options.characters)


def _verify(store: TokenStore, tokenizer: Tokenizer) -> None:
    manifest = read_manifest(store.prefix)
    verify(store, manifest, tokenizer)
    if manifest:
        print("verified: every token, document end and count")
    else:
        print("verified: every token; counts need a manifest")


def _refuse_invalid(options: Options, documents: int) -> None:
    problems = [
        f"document {number} is not in {options.prefix}, which has 0 to {documents - 1}. "
        "Set --documents."
        for number in options.documents
        if not 0 <= number < documents
    ]
    if options.characters < 0:
        problems.append(f"characters {options.characters} must be at least 0. Set --characters.")
    if problems:
        raise ConfigError(problems)


def _print_counts(store: TokenStore) -> None:
    manifest = read_manifest(store.prefix)
    tokens = store.lengths.sum()
    documents = counted(len(store), "document", ",")
    print(f"{store.prefix}: {documents}, {counted(tokens, 'token', ',')} of {store.dtype.name}")
    print(f"manifest: {json.dumps(asdict(manifest), indent=2) if manifest else 'none'}")
    print(draw_histogram(store.lengths))


def _print_document(store: TokenStore, number: int, tokenizer: Tokenizer, characters: int) -> None:
    tokens = store.document(number)
    text = tokenizer.decode(tokens)
    size = f"{counted(len(tokens), 'token', ',')}, {counted(len(text), 'character', ',')}"
    print(f"--- document {number}: {size}")
    print(text[:characters])
    if len(text) > characters:
        print(f"... {counted(len(text) - characters, 'more character', ',')}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is printed and its exit code becomes that of the process."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments, description=Options.__doc__)
        run(options)


if __name__ == "__main__":
    main()
