"""Time the loader alone, without a model, and weigh what a context rank holds of a sample while it is cut.

    python -m benchmarks.bench_loader
    python -m benchmarks.bench_loader --seq-length 131072 --ring-size 8 --tokens 20000000 --json F

A store of random ids is written to a temporary folder, in documents whose lengths are lognormal, and read as one ring
rank of a run reads it, for every --packing, with documents joined and kept apart (--reset-attention-mask,
--reset-position-ids, --eod-mask-loss). Counted are the tokens of whole samples, which is what a run consumes, and the
seconds that this process computed, so that what else runs on the machine is not counted. They are compared with
--consumes: by default what configs/tiny-cpu.yaml takes on two CPU processes. The median of the rounds is reported.

Weighed are the bytes of the arrays that exist at the fullest moment of one sample, the memory map not among them.
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

from benchmarks.common import table_row, write_json
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.bin_packing import FITS
from megatron_ring.data.loader import Loader
from megatron_ring.data.packing import Packing
from megatron_ring.data.samples import SampleStream
from megatron_ring.data.stream import Stream
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import ConfigError, not_positive, reporting_errors

KIB = 2**10
VOCAB_SIZE = 32_000
END_OF_DOCUMENT = 0
KINDS = ("concatenate", *FITS)


@dataclass(frozen=True)
class Options:
    seq_length: int = 1024
    """Tokens of a sample."""
    context_parallel: Literal["ring", "striped", "zigzag"] = "striped"
    """Layout of the ring rank that reads."""
    ring_size: int = 2
    """Ring ranks that share a sample."""
    tokens: int = 4_000_000
    """Tokens of the store."""
    document_length: int = 1000
    """Mean length of a document."""
    samples: int = 300
    """Samples read in a round."""
    rounds: int = 5
    """Timed rounds, after one that is weighed."""
    consumes: int = 4000
    """Tokens a second to compare with."""
    json: str = ""
    """Write the results to this file too."""


@dataclass(frozen=True)
class Result:
    """One row: how documents share samples, the seconds to open the store so, tokens a second, bytes at the peak."""

    packing: str
    documents: str
    opening_seconds: float
    tokens_per_second: float
    peak_bytes: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    _check(options)
    columns = (
        "packing",
        "documents",
        "opening s",
        "tokens/s",
        f"x {options.consumes:,}",
        "KiB at peak",
    )
    print(
        "\n".join([_setting(options), "", table_row(columns), table_row("---:" for _ in columns)]),
        flush=True,
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = _written(options, Path(folder) / "random")
        for packing, apart in product(KINDS, (False, True)):
            results.append(_result(options, store, packing, apart))
            print(_row(options, results[-1]), flush=True)
    findings = {"options": vars(options), "results": [vars(result) for result in results]}
    write_json(options.json, findings)


def _check(options: Options) -> None:
    wrong = not_positive(
        options, *(name for name, value in vars(options).items() if isinstance(value, int))
    )
    if not wrong and options.tokens <= options.seq_length:
        wrong = [
            f"tokens {options.tokens} fill no sample: it takes {options.seq_length + 1} (seq_length + 1). "
            f"Set --tokens to at least that, or --seq-length to at most {options.tokens - 1}."
        ]
    if wrong:
        raise ConfigError(wrong)
    _layout(options)  # refuses what it cannot cut


def _written(options: Options, prefix: Path) -> TokenStore:
    """A store of documents of random ids, each with its end; lengths spread over more than an order of magnitude."""
    random, left = np.random.default_rng(0), options.tokens
    with TokenStoreWriter(prefix, np.dtype("<u2")) as writer:
        while left:
            drawn = int(random.lognormal(np.log(options.document_length) - 0.5))  # of this mean
            length = min(max(drawn, 1), left)
            writer.add_document(
                np.append(random.integers(1, VOCAB_SIZE, length - 1), END_OF_DOCUMENT)
            )
            left -= length
    return TokenStore(prefix)


def _result(options: Options, store: TokenStore, packing: str, apart: bool) -> Result:
    began = time.process_time()
    stream = _stream(options, store, packing)
    opened = time.process_time() - began
    loader = _loader(options, stream, apart)
    peak = _peak(loader)
    seconds = statistics.median(_seconds(loader, options.samples) for _ in range(options.rounds))
    rate = options.samples * options.seq_length / seconds
    return Result(packing, "apart" if apart else "joined", opened, rate, peak)


def _stream(options: Options, store: TokenStore, packing: str) -> Stream:
    asked = (store, range(len(store)), options.seq_length, 1, VOCAB_SIZE)
    return (
        SampleStream(*asked) if packing == "concatenate" else WholeDocumentStream(*asked, packing)
    )


def _loader(options: Options, stream: Stream, apart: bool) -> Loader:
    packing = Packing(
        END_OF_DOCUMENT, reset_attention_mask=apart, reset_position_ids=apart, eod_mask_loss=apart
    )
    return Loader(
        stream, _layout(options), 0, 0, 1, micro_batch_size=1, global_batch_size=1, packing=packing
    )


def _layout(options: Options) -> Layout:
    return Layout(options.context_parallel, options.seq_length, options.ring_size)


def _peak(loader: Loader) -> int:
    loader.next_step()  # what is made once is not a sample's
    tracemalloc.start()
    loader.next_step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _seconds(loader: Loader, samples: int) -> float:
    began = time.process_time()
    for _ in range(samples):
        loader.next_step()
    return time.process_time() - began


# ---- what is told ----


def _setting(options: Options) -> str:
    return (
        f"ring rank 0 of {options.ring_size}, {options.context_parallel}, samples of {options.seq_length:,} tokens, "
        f"documents of {options.document_length:,} in the mean, median of {options.rounds} rounds of {options.samples}"
    )


def _row(options: Options, result: Result) -> str:
    rate = result.tokens_per_second
    told = [f"{result.opening_seconds:.2f}", f"{rate:,.0f}", f"{rate / options.consumes:,.0f}"]
    return table_row([result.packing, result.documents, *told, f"{result.peak_bytes / KIB:,.1f}"])


if __name__ == "__main__":
    with reporting_errors():
        main()
