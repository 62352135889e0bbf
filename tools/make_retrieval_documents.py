"""Write documents that ask for their own facts, to train retrieval over long distances.

    python tools/make_retrieval_documents.py --output data/needles/short.jsonl --documents 20000
    python tools/prepare_data.py --input data/needles/short.jsonl --output-prefix data/needles/short

The lines of a document are needles as `tools/evaluate.py needles` hides them, repetitions of these,
whose values are to be retrieved, and lines of Python's standard library.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import numpy as np
import tyro

from megatron_ring.data.retrieval import WORDINGS, library_texts, text_lines, training_document
from megatron_ring.errors import ConfigError, not_positive, reporting_errors


@dataclass(frozen=True)
class Options:
    """The documents to write."""

    output: Path
    """File for one JSON object a line, with the key "text"."""
    documents: int = 10_000
    """Number of documents."""
    lines: tuple[int, int] = (16, 256)
    """Fewest and most lines of a document. Each power of two between them is as frequent."""
    new_share: float = 0.3
    """Share of the needles that give a value to a new key, until none is left; the others repeat
    an earlier line."""
    haystack_share: float = 0.2
    """Share of the lines that are text instead of needles."""
    popularity_ratio: float = 1.0
    """How much more often the most popular key is repeated than the least popular one. In a long
    document with 1 the last line of a key is always near, because keys are few."""
    wording: Literal["sentence", "pair"] = "pair"
    """The form of the needles, as in tools/evaluate.py."""
    seed: int = 1
    """Random seed of the documents."""

    def problems(self) -> list[str]:
        """Return every invalid option, with its remedy."""
        problems = not_positive(self, "documents")
        fewest, most = self.lines
        if not 1 <= fewest <= most:
            problems.append(f"lines {fewest} {most} must be at least 1 and in order. Set --lines.")
        for name in ("new_share", "haystack_share"):
            share = getattr(self, name)
            if not 0 <= share < 1 or (name == "new_share" and share == 0):
                flag = name.replace("_", "-")
                problems.append(f"{name} {share} must be above 0 and below 1. Set --{flag}.")
        if not self.popularity_ratio >= 1:
            problems.append(
                f"popularity_ratio {self.popularity_ratio} must be at least 1. Set "
                "--popularity-ratio."
            )
        if self.seed < 0:
            problems.append(f"seed {self.seed} must be at least 0. Set --seed.")
        return problems


def main(options: Options) -> None:
    """Write the file; the same options give the same documents."""
    if problems := options.problems():
        raise ConfigError(problems)
    random = np.random.default_rng(options.seed)
    haystack = text_lines(library_texts(), random) if options.haystack_share else None
    fewest, most = np.log(options.lines)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    # Renamed once it is complete: a file that a signal cut short would be taken for a corpus.
    unfinished = options.output.with_name(f"{options.output.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for _ in range(options.documents):
            lines = round(np.exp(random.uniform(fewest, most)))
            text = training_document(
                WORDINGS[options.wording],
                lines,
                options.new_share,
                haystack,
                options.haystack_share,
                options.popularity_ratio,
                random,
            )
            written += file.write(json.dumps({"text": text}) + "\n")
    unfinished.replace(options.output)
    print(f"{options.output}: {options.documents:,} documents, {written:,} characters")


if __name__ == "__main__":
    with reporting_errors():
        main(tyro.cli(Options, description=__doc__))
        sys.exit(0)
