"""Tokenize text into a token store for pretrain_gpt.py: the command line of data/prepare.py."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro

from megatron_ring.data.corpus import Corpus, copy_pipes, gather, python_library
from megatron_ring.data.documents import MAX_DOCUMENT_BYTES, Reading
from megatron_ring.data.file_formats import SUFFIXES
from megatron_ring.data.inspection import draw_histogram
from megatron_ring.data.manifest import Manifest, tokenizer_path
from megatron_ring.data.prepare import (
    DEFAULT_VOCAB_SIZE,
    Prepared,
    fit_tokenizer,
    prepare,
    work_folder,
)
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import (
    ConfigError,
    DataError,
    MegatronRingError,
    counted,
    not_positive,
    reporting_errors,
)
from megatron_ring.flag_hints import PREPROCESS

# Names in a store's folder that belong to its tokenizer.
_TOKENIZER_NAMES = ("tokenizer", "tokenizer_config")
_STDIN_SUFFIXES = {"jsonl": ".jsonl", "txt": ".text"}


@dataclass(frozen=True)
class Options:
    """Write P.bin and P.idx (Megatron's format), P.json, and the tokenizer beside them."""

    output_prefix: Path
    """P: the path of the store, without a suffix. P.work holds finished shards until the end."""
    input: tuple[str, ...] = ()
    """Files, folders, globs, named pipes, and - for standard input. JSON lines (.jsonl, .ndjson,
    .jsonlines, or .json and other names with such content) hold one document per line, .parquet one
    per row; any other text is one document. .gz, .bz2, .xz and .zst are decompressed, and the texts
    and JSON lines in .tar and .zip are read."""
    python_library: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read the source text of Python's standard library instead of --input."""
    stdin_format: Literal["jsonl", "txt"] = "jsonl"
    """The format of standard input: jsonl, one document per line; txt, one document."""
    tokenizer_model: str = ""
    """The sentencepiece model or tokenizer.json to use. Empty: train one on the text."""
    vocab_size: int = 0
    """Vocabulary size of the tokenizer to train. 0: 4096."""
    eod_token: str = ""
    """The token that ends each document. Empty: the end-of-text token of --tokenizer-model."""
    prepend_bos: Literal["auto", "on", "off"] = "auto"
    """Whether documents begin with the tokenizer's begin-of-sentence token, as for Llama and
    Mistral. auto: if the tokenizer itself puts one before a text (by the post-processor of a
    tokenizer.json or add_bos_token in tokenizer_config.json), or is a sentencepiece model that has
    one."""
    suffixes: tuple[str, ...] = SUFFIXES
    """Suffixes, before that of a compression, of the files to read from folders and archives.
    Other files are counted."""
    json_key: str = "text"
    """The key of the text in a line of .jsonl, or its column in .parquet."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a document that cannot be read. skip: report, count and leave it out."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """The longest document, in bytes of its line, text or cell. A process takes 30 bytes of memory
    per byte of the document with a sentencepiece model, and 150 with a tokenizer.json."""
    workers: int = os.cpu_count() or 1
    """Number of tokenizing processes; it does not affect the files."""

    def problems(self) -> list[str]:
        """Return every invalid or conflicting option, each with its remedy."""
        problems = []
        if self.python_library == bool(self.input):
            problems.append(
                "exactly one source of text is needed. Set --input or --python-library."
            )
        if self.tokenizer_model and self.vocab_size:
            problems.append(
                "an existing tokenizer has its own vocabulary. Remove --vocab-size or "
                "--tokenizer-model."
            )
        if self.eod_token and not self.tokenizer_model:
            problems.append(
                "a newly trained tokenizer has its own end-of-document token. Remove --eod-token."
            )
        if self.output_prefix.name in ("", ".."):
            problems.append(
                f"{self.output_prefix} is a folder, and the files of a store need a name. Set "
                f"--output-prefix to a name in it, for example {self.output_prefix / 'tokens'}."
            )
        if self.output_prefix.name in _TOKENIZER_NAMES:
            problems.append(
                f"{self.output_prefix}.json is the tokenizer's own file. Set --output-prefix to "
                "another name."
            )
        if self.vocab_size < 0:
            problems.append(f"vocab_size {self.vocab_size} must be above 0. Set --vocab-size.")
        return problems + not_positive(self, "workers", "max_document_bytes")


def run(options: Options) -> Prepared:
    """Train or load the tokenizer and write the store. Raises ConfigError and DataError."""
    if problems := options.problems():
        raise ConfigError(problems)
    try:
        _announce_replacement(options.output_prefix)
        corpus = python_library() if options.python_library else _gather_input(options)
        tokenizer = _tokenizer(options, corpus)
        return prepare(
            corpus,
            options.output_prefix,
            tokenizer,
            options.workers,
            progress=True,
            prepend_bos=options.prepend_bos,
        )
    except OSError as error:
        # Errors of reading are DataErrors already, so this one is of writing.
        raise DataError(
            f"{options.output_prefix} cannot be written: {error}. Free disk space, or set "
            f"--output-prefix. Finished shards are kept in {work_folder(options.output_prefix)}; "
            "the same command continues from them."
        ) from error


def _announce_replacement(prefix: Path) -> None:
    """Print that a store of this prefix is going to be replaced, before any text is tokenized."""
    try:
        documents = len(TokenStore(prefix))
    except DataError:
        return
    print(
        f"{prefix} is already a store of {counted(documents, 'document', ',')}. It is replaced "
        "when all of the new one is tokenized; interrupt this program to keep it.",
        file=sys.stderr,
        flush=True,
    )


def _gather_input(options: Options) -> Corpus:
    inputs = copy_pipes(
        options.input, work_folder(options.output_prefix), _STDIN_SUFFIXES[options.stdin_format]
    )
    reading = Reading(options.json_key, options.on_error, options.max_document_bytes)
    return gather(inputs, options.suffixes, reading)


def _tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    if options.tokenizer_model:
        return Tokenizer.load(options.tokenizer_model, options.eod_token)
    return fit_tokenizer(corpus, options.vocab_size or DEFAULT_VOCAB_SIZE, progress=True)


def _summary(prefix: Path, manifest: Manifest) -> str:
    left_out = [f"{count:,} {reason}" for reason, count in manifest.left_out.items()]
    lines = [
        f"{prefix}.bin, .idx, .json: {counted(manifest.documents, 'document', ',')}, "
        f"{counted(manifest.tokens, 'token', ',')}, "
        f"{manifest.bytes_per_token:.2f} bytes per token, {manifest.skipped:,} skipped. "
        f"Left out: {', '.join(left_out) or 'nothing'}."
    ]
    if manifest.begin_of_document:
        lines.append(f"Documents begin with ids {list(manifest.begin_of_document)} (BOS).")
    lines.append(f"{tokenizer_path(prefix)}: {manifest.vocab_size:,} ids.")
    lines.append(draw_histogram(TokenStore(prefix).lengths))
    return "\n".join(lines)


def _print_megatron_hints(arguments: list[str]) -> None:
    """Print, for each flag of Megatron's preprocess_data.py, what replaces it here."""
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for flag in dict.fromkeys(flags):
        if text := PREPROCESS.get(flag.removeprefix("--").replace("_", "-")):
            print(f"Megatron's {flag}: {text}.", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return 0, or the exit code of the error that was printed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = tyro.cli(Options, args=arguments, description=Options.__doc__)
    except SystemExit as exit_request:
        if exit_request.code:
            _print_megatron_hints(arguments)
        raise
    try:
        prepared = run(options)
    except MegatronRingError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for problem in prepared.skipped:
        print(f"skipped {problem}", file=sys.stderr)
    print(_summary(options.output_prefix, prepared.manifest))
    return 0


if __name__ == "__main__":
    with reporting_errors():
        sys.exit(main())
