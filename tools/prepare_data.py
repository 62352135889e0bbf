"""Turn text into a token store that pretrain_gpt.py reads: a command line over megatron_ring.data.prepare."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_ring.data.documents import TEXT_SUFFIXES, Corpus, gather, python_library
from megatron_ring.data.manifest import Manifest, tokenizer_path
from megatron_ring.data.prepare import DEFAULT_VOCAB_SIZE, fit_tokenizer, prepare
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import ConfigError, MegatronRingError


@dataclass(frozen=True)
class Options:
    """Write P.bin and P.idx (Megatron's format), P.json, and tokenizer.model beside them."""

    output_prefix: Path
    """P: where to write, without a suffix."""
    input: tuple[Path, ...] = ()
    """Files, one document each (.jsonl: one a line), and folders of them."""
    python_library: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take the source text of Python's own standard library instead of --input."""
    tokenizer_model: str = ""
    """A sentencepiece model to use. Empty: one is trained on the text."""
    vocab_size: int = 0
    """Ids of the tokenizer to train. 0: 4096."""
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    """Which files of a folder are text."""
    json_key: str = "text"
    """Where the text is in a line of .jsonl."""
    workers: int = os.cpu_count() or 1
    """Threads that tokenize; they change nothing in the files."""

    def problems(self) -> list[str]:
        """What cannot be met, each with its remedy."""
        found = []
        if self.python_library == bool(self.input):
            found.append("one source of text is needed, no more. Set --input or --python-library.")
        if self.tokenizer_model and self.vocab_size:
            found.append("a tokenizer that exists has its own vocabulary. Drop --vocab-size or --tokenizer-model.")
        if self.vocab_size < 0:
            found.append(f"vocab_size {self.vocab_size} must be above 0. Set --vocab-size.")
        if self.workers < 1:
            found.append(f"workers {self.workers} must be at least 1. Set --workers.")
        return found


def run(options: Options) -> Manifest:
    """Train or load the tokenizer, write the store. Raises ConfigError and DataError."""
    if problems := options.problems():
        raise ConfigError(problems)
    corpus = python_library() if options.python_library else gather(options.input, options.suffixes, options.json_key)
    return prepare(corpus, options.output_prefix, _tokenizer(options, corpus), options.workers, progress=True)


def _tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    if options.tokenizer_model:
        return Tokenizer.load(options.tokenizer_model)
    return fit_tokenizer(corpus, options.vocab_size or DEFAULT_VOCAB_SIZE, progress=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or that of the error whose message was printed."""
    options = tyro.cli(Options, args=arguments, description=Options.__doc__)
    try:
        manifest = run(options)
    except MegatronRingError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{options.output_prefix}.bin, .idx, .json: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.bytes_per_token:.2f} bytes per token. "
        f"{tokenizer_path(options.output_prefix)}: {manifest.vocab_size:,} ids."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
