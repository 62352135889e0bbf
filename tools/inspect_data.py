"""What is in a token store: a command line over its index, tokens, manifest and tokenizer."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_ring.data.histogram import drawn
from megatron_ring.data.inspection import verify
from megatron_ring.data.manifest import check_tokenizer, read_manifest, tokenizer_path
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import ConfigError, reporting_errors

_FIRST = 3


@dataclass(frozen=True)
class Options:
    """Show the manifest, the lengths and some documents of the store P.bin and P.idx."""

    prefix: Annotated[Path, tyro.conf.Positional]
    """P: the store, without a suffix."""
    documents: tuple[int, ...] = ()
    """Numbers of the documents to show, from 0. Empty: the first 3."""
    characters: int = 1000
    """Characters of each document that are shown; the rest is counted."""
    tokenizer_model: str = ""
    """The tokenizer the store was written with. Empty: the one beside the store."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read every token and check index, manifest and tokenizer against each other."""


def run(options: Options) -> None:
    """Print what was asked for. Raises ConfigError for a document that is not there, and DataError."""
    store = TokenStore(options.prefix)
    tokenizer = Tokenizer.load(options.tokenizer_model or tokenizer_path(options.prefix))
    check_tokenizer(options.prefix, tokenizer)
    _refuse_outside(options, len(store))
    _print_counts(store)
    if options.verify:
        _verify(store, tokenizer)
    for number in options.documents or range(min(_FIRST, len(store))):
        _print_document(store, number, tokenizer, options.characters)


def _verify(store: TokenStore, tokenizer: Tokenizer) -> None:
    manifest = read_manifest(store.prefix)
    verify(store, manifest, tokenizer)
    print(
        "verified: every token"
        + (", document end and count" if manifest else "; counts need a manifest")
    )


def _refuse_outside(options: Options, documents: int) -> None:
    problems = [
        f"document {number} is not in {options.prefix}, which has 0 to {documents - 1}. Set --documents."
        for number in options.documents
        if not 0 <= number < documents
    ]
    if options.characters < 0:
        problems.append(f"characters {options.characters} must be at least 0. Set --characters.")
    if problems:
        raise ConfigError(problems)


def _print_counts(store: TokenStore) -> None:
    manifest = read_manifest(store.prefix)
    print(
        f"{store.prefix}: {len(store):,} documents, {store.lengths.sum():,} tokens of {store.dtype.name}"
    )
    print(f"manifest: {json.dumps(asdict(manifest), indent=2) if manifest else 'none'}")
    print(drawn(store.lengths))


def _print_document(store: TokenStore, number: int, tokenizer: Tokenizer, characters: int) -> None:
    tokens = store.document(number)
    text = tokenizer.decode(tokens)
    print(f"--- document {number}: {len(tokens):,} tokens, {len(text):,} characters")
    print(text[:characters])
    if len(text) > characters:
        print(f"... {len(text) - characters:,} characters more")


def main(arguments: list[str] | None = None) -> None:
    """Leaves with the exit code of the error whose message was printed."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments, description=Options.__doc__)
        run(options)


if __name__ == "__main__":
    main()
