"""Turn text into a token store that pretrain_gpt.py reads: a command line over megatron_ring.data.prepare."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_ring.data.corpus import Corpus, gather, keep_pipes, python_library
from megatron_ring.data.documents import MAX_DOCUMENT_BYTES, Reading
from megatron_ring.data.file_formats import SUFFIXES
from megatron_ring.data.histogram import drawn
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
    not_positive,
    reporting_errors,
)
from megatron_ring.other_names import PREPROCESS

# Names beside a store that belong to its tokenizer.
_TAKEN = ("tokenizer", "tokenizer_config")
_STDIN_SUFFIXES = {"jsonl": ".jsonl", "txt": ".text"}


@dataclass(frozen=True)
class Options:
    """Write P.bin and P.idx (Megatron's format), P.json, and the tokenizer beside them."""

    output_prefix: Path
    """P: where to write, without a suffix. P.work keeps what is finished until all is."""
    input: tuple[str, ...] = ()
    """Files, folders of them, globs, named pipes, and - for standard input. JSON lines (.jsonl,
    .ndjson, .jsonlines, or .json and other names with such content) have a document a line, a
    .parquet one a row, any other text is one. .gz, .bz2, .xz and .zst are decompressed, and the
    texts and JSON lines in .tar and .zip are read."""
    python_library: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take the source text of Python's own standard library instead of --input."""
    stdin_format: Literal["jsonl", "txt"] = "jsonl"
    """What standard input is: a document a line, or one document."""
    tokenizer_model: str = ""
    """A sentencepiece model or a tokenizer.json to use. Empty: one is trained on the text."""
    vocab_size: int = 0
    """Ids of the tokenizer to train. 0: 4096."""
    eod_token: str = ""
    """The token that ends each document. Empty: the one that --tokenizer-model has for that."""
    prepend_bos: Literal["auto", "on", "off"] = "auto"
    """Whether documents begin with the tokenizer's begin-of-sentence token, as Llama's and
    Mistral's do. auto: if the tokenizer itself puts one before a text (the post-processor of a
    tokenizer.json, add_bos_token in tokenizer_config.json, or a sentencepiece model that has
    one)."""
    suffixes: tuple[str, ...] = SUFFIXES
    """Which files of a folder and of an archive are read, whatever compresses them; the others are
    counted."""
    json_key: str = "text"
    """Where the text is in a line of .jsonl, or its column in .parquet."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a document that cannot be read; what is skipped is told and counted."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """The longest document, in bytes of its line, text or cell. For each of them a process takes 30
    bytes of memory with a sentencepiece model and 150 with a tokenizer.json."""
    workers: int = os.cpu_count() or 1
    """Processes that tokenize; they change nothing in the files."""

    def problems(self) -> list[str]:
        """What cannot be met, each with its remedy."""
        found = []
        if self.python_library == bool(self.input):
            found.append("one source of text is needed, no more. Set --input or --python-library.")
        if self.tokenizer_model and self.vocab_size:
            found.append(
                "a tokenizer that exists has its own vocabulary. Drop --vocab-size or --tokenizer-model."
            )
        if self.eod_token and not self.tokenizer_model:
            found.append(
                "a tokenizer that is trained has its own end of documents. Drop --eod-token."
            )
        if self.output_prefix.name in ("", ".."):
            found.append(
                f"{self.output_prefix} is a folder, and the files of a store need a name. "
                f"Set --output-prefix to a name in it, {self.output_prefix / 'tokens'} for example."
            )
        if self.output_prefix.name in _TAKEN:
            found.append(
                f"{self.output_prefix}.json is the tokenizer's own file. Set --output-prefix to another name."
            )
        if self.vocab_size < 0:
            found.append(f"vocab_size {self.vocab_size} must be above 0. Set --vocab-size.")
        return found + not_positive(self, "workers", "max_document_bytes")


def run(options: Options) -> Prepared:
    """Train or load the tokenizer, write the store. Raises ConfigError and DataError."""
    if problems := options.problems():
        raise ConfigError(problems)
    try:
        corpus = python_library() if options.python_library else _gathered(options)
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
        # What cannot be read is a DataError already.
        raise DataError(
            f"{options.output_prefix} cannot be written: {error}. Make room, or set --output-prefix. What is finished "
            f"is kept in {work_folder(options.output_prefix)} for the same command."
        ) from error


def _gathered(options: Options) -> Corpus:
    inputs = keep_pipes(
        options.input, work_folder(options.output_prefix), _STDIN_SUFFIXES[options.stdin_format]
    )
    reading = Reading(options.json_key, options.on_error, options.max_document_bytes)
    return gather(inputs, options.suffixes, reading)


def _tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    if options.tokenizer_model:
        return Tokenizer.load(options.tokenizer_model, options.eod_token)
    return fit_tokenizer(corpus, options.vocab_size or DEFAULT_VOCAB_SIZE, progress=True)


def _summary(prefix: Path, manifest: Manifest) -> str:
    begin = (
        f"Documents begin with ids {list(manifest.begin_of_document)} (BOS).\n"
        if manifest.begin_of_document
        else ""
    )
    left_out = [f"{count:,} {reason}" for reason, count in manifest.left_out.items()]
    return (
        f"{prefix}.bin, .idx, .json: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.bytes_per_token:.2f} bytes per token, {manifest.skipped:,} skipped. "
        f"Left out: {', '.join(left_out) or 'nothing'}.\n{begin}"
        f"{tokenizer_path(prefix)}: {manifest.vocab_size:,} ids.\n{drawn(TokenStore(prefix).lengths)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or that of the error whose message was printed."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = tyro.cli(Options, args=given, description=Options.__doc__)
    except SystemExit as leaving:
        flags = dict.fromkeys(word.partition("=")[0] for word in given if word.startswith("--"))
        for flag in flags if leaving.code else ():
            if text := PREPROCESS.get(flag.removeprefix("--").replace("_", "-")):
                print(f"Megatron's {flag}: {text}.", file=sys.stderr)
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
