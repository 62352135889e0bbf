"""Time the data loader without a model and measure what a context rank holds of a sample.

    python -m benchmarks.bench_loader
    python -m benchmarks.bench_loader --seq-length 131072 --ring-size 8 --tokens 20000000 --json F

A token store of random ids, in documents of lognormal lengths, is written to a temporary folder and
read as one ring rank of a training run reads it: for every --packing, with attention across
documents ("joined") and without ("apart": --reset-attention-mask, --reset-position-ids,
--eod-mask-loss). Throughput counts the tokens of whole samples, which is what a training run
consumes, and CPU seconds of this process, so that other load on the machine does not count. It is
compared with --consumes, by default the throughput of configs/tiny-cpu.yaml on two CPU processes.
The median of the rounds is reported.

Memory is the peak number of bytes in arrays while one sample is read, without the memory map.
"""

import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.common import check_outputs, table_head, table_row, write_json
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.bin_packing import PACKERS
from megatron_ring.data.document_boundaries import DocumentBoundaries
from megatron_ring.data.loader import Loader
from megatron_ring.data.samples import SampleStream
from megatron_ring.data.stream import Stream
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import ConfigError, counted, not_positive, reporting_errors

KIB = 2**10
VOCAB_SIZE = 32_000
END_OF_DOCUMENT = 0
KINDS = ("concatenate", *PACKERS)


@dataclass(frozen=True)
class Options:
    seq_length: int = 1024
    """Tokens per sample."""
    context_parallel: Literal["ring", "striped", "zigzag"] = "striped"
    """Layout of the tokens over the ring ranks."""
    ring_size: int = 2
    """Ring ranks that share a sample."""
    tokens: int = 4_000_000
    """Tokens of the store."""
    document_length: int = 1000
    """Mean length of a document in tokens."""
    samples: int = 300
    """Samples per round."""
    rounds: int = 5
    """Timed rounds, after one in which memory is measured."""
    consumes: int = 4000
    """Tokens per second to compare with."""
    json: str = ""
    """Also write the results to this file."""


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        packing: How documents share samples, a value of --packing.
        documents: "joined" if tokens attend across documents, else "apart".
        opening_seconds: CPU seconds to open the store with this packing.
        peak_bytes: Peak memory while one sample is read.
    """

    packing: str
    documents: str
    opening_seconds: float
    tokens_per_second: float
    peak_bytes: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json)
    _check(options)
    columns = (
        "packing",
        "documents",
        "opening s",
        "tokens/s",
        f"x {options.consumes:,}",
        "peak KiB",
    )
    print(_setting(options))
    print()
    print(table_head(columns), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = _write_store(options, Path(folder) / "random")
        for packing, apart in product(KINDS, (False, True)):
            result = _measure(options, store, packing, apart)
            results.append(result)
            print(_row(options, result), flush=True)
    findings = {"options": vars(options), "results": [vars(result) for result in results]}
    write_json(options.json, findings)


def _check(options: Options) -> None:
    numbers = [name for name, value in vars(options).items() if isinstance(value, int)]
    problems = not_positive(options, *numbers)
    if not problems and options.tokens <= options.seq_length:
        needed = options.seq_length + 1
        problems.append(
            f"tokens {options.tokens} do not fill a sample, which needs {needed} "
            f"(seq_length + 1). Set --tokens to at least that, or --seq-length to at most "
            f"{options.tokens - 1}."
        )
    if problems:
        raise ConfigError(problems)
    _layout(options)  # raises ConfigError for a length that does not fit the layout


def _write_store(options: Options, prefix: Path) -> TokenStore:
    """Write a store of documents of random ids, each with its end-of-document token.

    Lengths spread over more than an order of magnitude.
    """
    generator = np.random.default_rng(0)
    left = options.tokens
    log_mean = np.log(options.document_length) - 0.5  # gives the lengths the required mean
    with TokenStoreWriter(prefix, np.dtype("<u2")) as writer:
        while left:
            drawn = int(generator.lognormal(log_mean))
            length = min(max(drawn, 1), left)
            ids = generator.integers(1, VOCAB_SIZE, length - 1)
            writer.add_document(np.append(ids, END_OF_DOCUMENT))
            left -= length
    return TokenStore(prefix)


def _measure(options: Options, store: TokenStore, packing: str, apart: bool) -> Result:
    start = time.process_time()
    stream = _stream(options, store, packing)
    opening_seconds = time.process_time() - start
    loader = _loader(options, stream, apart)
    peak = _peak(loader)
    seconds = statistics.median(_seconds(loader, options.samples) for _ in range(options.rounds))
    tokens_per_second = options.samples * options.seq_length / seconds
    documents = "apart" if apart else "joined"
    return Result(packing, documents, opening_seconds, tokens_per_second, peak)


def _stream(options: Options, store: TokenStore, packing: str) -> Stream:
    arguments = (store, range(len(store)), options.seq_length, 1, VOCAB_SIZE)
    if packing == "concatenate":
        return SampleStream(*arguments)
    return WholeDocumentStream(*arguments, packing)


def _loader(options: Options, stream: Stream, apart: bool) -> Loader:
    packing = DocumentBoundaries(
        END_OF_DOCUMENT, reset_attention_mask=apart, reset_position_ids=apart, eod_mask_loss=apart
    )
    return Loader(
        stream,
        _layout(options),
        0,
        0,
        1,
        micro_batch_size=1,
        global_batch_size=1,
        boundaries=packing,
    )


def _layout(options: Options) -> Layout:
    return Layout(options.context_parallel, options.seq_length, options.ring_size)


def _peak(loader: Loader) -> int:
    loader.next_step()  # allocates what is kept for the whole run
    tracemalloc.start()
    loader.next_step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def _seconds(loader: Loader, samples: int) -> float:
    start = time.process_time()
    for _ in range(samples):
        loader.next_step()
    return time.process_time() - start


# ---- report ----


def _setting(options: Options) -> str:
    return (
        f"ring rank 0 of {options.ring_size}, {options.context_parallel}, "
        f"samples of {options.seq_length:,} tokens, "
        f"documents of {options.document_length:,} tokens on average, "
        f"median of {counted(options.rounds, 'round')} of {counted(options.samples, 'sample')}"
    )


def _row(options: Options, result: Result) -> str:
    rate = result.tokens_per_second
    cells = [
        result.packing,
        result.documents,
        f"{result.opening_seconds:.2f}",
        f"{rate:,.0f}",
        f"{rate / options.consumes:,.0f}",
        f"{result.peak_bytes / KIB:,.1f}",
    ]
    return table_row(cells)


if __name__ == "__main__":
    with reporting_errors():
        main()
