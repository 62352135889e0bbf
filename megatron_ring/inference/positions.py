"""Loss and bits per byte by position, which show whether a model uses its context.

A prediction is counted by its *context*: the number of tokens that it may see, its own input
included, which is its position plus one. The samples are those of training, read by the same
loader, so without further options the loss over all positions is the validation loss of the run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_ring.checkpoint import store
from megatron_ring.config import Config, DataConfig, PositionsConfig
from megatron_ring.config.evaluation import DocumentsKind
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.dataset import Dataset, bits_per_byte
from megatron_ring.data.document_boundaries import IGNORE_INDEX, NO_BOUNDARIES
from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.long_documents import LongDocumentStream
from megatron_ring.data.stream import Stream
from megatron_ring.errors import ConfigError, DataError
from megatron_ring.inference.loading import Loaded, OpenedModel
from megatron_ring.inference.scoring import check_finite, layout_for, score_batch
from megatron_ring.parallel.consensus import run_checked, run_checked_each_step

# The columns of a table of sums: nats, tokens, bytes of text.
_LOSS, _TOKENS, _BYTES = range(3)


@dataclass(frozen=True)
class Bucket:
    """The predictions made from ``first`` to ``last`` tokens of context.

    loss: mean in nats per token. Both results are None for a bucket without tokens, and
    bits_per_byte for one whose targets stand for no text.
    """

    first: int
    last: int
    tokens: int
    loss: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Curve:
    """Loss by position, of samples of ``length`` tokens. ``total`` is over all buckets."""

    length: int
    documents: DocumentsKind
    samples: int
    total: Bucket
    buckets: list[Bucket]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated, known before the weights are read.

    Attributes:
        run: the config of the run that wrote the checkpoint; the defaults for other models.
        lengths: tokens of a sample, one curve for each kind of documents.
        tokens: of a curve where ``samples`` is 0.
    """

    config: PositionsConfig
    run: Config
    lengths: tuple[int, ...]
    tokens: int

    @staticmethod
    def of(config: PositionsConfig, opened: OpenedModel) -> "EvaluationPlan":
        """Resolve the options for a model. Raises ConfigError with all problems."""
        problems = config.problems()
        lengths = config.lengths or (opened.trained_length,)
        problems += [
            f"lengths has {length}, and the model has {opened.seq_length} positions. Set --lengths "
            f"to at most {opened.seq_length}, or --seq-length, which a model with RoPE can extend."
            for length in lengths
            if length > opened.seq_length
        ]
        is_ours = (opened.source / store.STATE).is_file()
        if not is_ours and not config.data_path:
            problems.append(
                f"data_path is empty, and {opened.source} is not a checkpoint of a run that has "
                "data. Set --data-path to the P of a token store P.bin."
            )
        if problems:
            raise ConfigError(problems)
        if not is_ours:
            return EvaluationPlan(config, Config(), lengths, _tokens(Config(), 1, max(lengths)))
        run = store.read_config(opened.source)
        state, _ = store.described(opened.source)
        # Without --global-batch-size it depends on the processes, which the config does not record.
        samples_a_step = run.training.global_batch_size or max(
            run.training.micro_batch_size, state.consumed_samples // max(1, state.step)
        )
        return EvaluationPlan(
            config, run, lengths, _tokens(run, samples_a_step, run.data.seq_length)
        )

    def samples_of(self, length: int) -> int:
        """Return the samples of a curve."""
        return self.config.samples or max(1, self.tokens // length)

    def data(self, length: int, documents: DocumentsKind) -> DataConfig:
        """Return the options by which the samples of a curve are read."""
        data = replace(self.run.data, seq_length=length)
        if self.config.data_path:
            data = replace(data, data_path=self.config.data_path, tokenizer_model="")
        if self.config.part == "all":
            data = replace(data, split=(1.0, 0.0))
        if documents in ("joined", "separated"):
            is_separated = documents == "separated"
            data = replace(data, reset_attention_mask=is_separated, reset_position_ids=is_separated)
        return data


def _tokens(run: Config, samples_a_step: int, length: int) -> int:
    return run.training.eval_iters * samples_a_step * length


def evaluate(
    plan: EvaluationPlan, loaded: Loaded, on_sample: Callable[[int], object] | None = None
) -> list[Curve]:
    """Return the curves, lengths within kinds of documents, on every rank.

    Collective over all ranks; blocks. ``on_sample`` is called with 1 after each sample. Raises
    DataError or ConfigError on every rank for data that cannot be read or does not fit the model.
    """
    # All data is opened first, so that a curve that cannot be drawn is no waste of the others.
    opened = [
        (length, documents, _open(plan, loaded, length, documents))
        for documents in plan.config.documents
        for length in plan.lengths
    ]
    curves = []
    for length, documents, (dataset, stream) in opened:
        samples = plan.samples_of(length)
        if isinstance(stream, LongDocumentStream):
            samples = min(samples, stream.count)
        sums = _sum_by_context(loaded, dataset, stream, samples, plan, on_sample)
        curves.append(_curve(length, documents, samples, sums, plan.config.bucket_width))
    return curves


def _open(
    plan: EvaluationPlan, loaded: Loaded, length: int, documents: DocumentsKind
) -> tuple[Dataset, Stream]:
    """Open the samples of a curve, on all ranks. Collective; blocks."""

    def open_data() -> tuple[Dataset, Stream]:
        data = plan.data(length, documents)
        if problems := data.problems():
            raise ConfigError(problems)
        seed = plan.run.training.seed
        part = "training" if plan.config.part == "all" else plan.config.part
        try:
            dataset = Dataset.open(data, seed, needed=(part,))
        except DataError as error:
            where = f"samples of --lengths {length} from --part {plan.config.part}"
            raise DataError(f"{where}: {problem}" for problem in error.problems) from error
        _check_tokenizer(dataset, loaded)
        stream = getattr(dataset, part)
        if stream is None:
            split = " ".join(f"{share:g}" for share in data.split)
            raise DataError(
                f"part {part} has no documents: the run's split is {split}. Set --part to one of "
                "the others, or all."
            )
        if documents == "long":
            stream = LongDocumentStream.of(stream, seed)
            dataset = replace(dataset, boundaries=NO_BOUNDARIES)
        return dataset, stream

    return run_checked(loaded.consensus, open_data)


def _check_tokenizer(dataset: Dataset, loaded: Loaded) -> None:
    """Raise DataError if the data was written with another tokenizer than the model's."""
    prefixes = ", ".join(dataset.prefixes)
    own = loaded.tokenizer
    if own is not None and own.fingerprint != dataset.tokenizer.fingerprint:
        raise DataError(
            f"token store {prefixes} was written with another tokenizer (sha256 "
            f"{dataset.tokenizer.fingerprint[:12]}) than the model's ({own.fingerprint[:12]}). "
            "Set --data-path to a store that was written with the model's, or --tokenizer-model."
        )
    if dataset.tokenizer.vocab_size > loaded.vocab_size:
        raise DataError(
            f"token store {prefixes} was written with a tokenizer of "
            f"{dataset.tokenizer.vocab_size} ids, and the model has {loaded.vocab_size} rows. Set "
            "--data-path to a store of the model's tokenizer."
        )


def _sum_by_context(
    loaded: Loaded,
    dataset: Dataset,
    stream: Stream,
    samples: int,
    plan: EvaluationPlan,
    on_sample: Callable[[int], object] | None,
) -> torch.Tensor:
    """Return the sums of nats, tokens and bytes over all ranks, by context: (length + 1, 3)."""
    layout = layout_for(loaded, stream.seq_length)
    ring_rank = dist.get_rank(loaded.groups.ring_links[0]) if loaded.groups.ring_links else 0
    loader = Loader(stream, layout, ring_rank, 0, 1, 1, 1, boundaries=dataset.boundaries)
    bytes_per_token_V = torch.from_numpy(dataset.tokenizer.bytes_per_token)
    sums = torch.zeros(stream.seq_length + 1, 3, dtype=torch.float64)
    for _ in range(samples):
        (batch,) = run_checked_each_step(loaded.consensus, loader.next_step)
        scores = score_batch(loaded, layout, batch)
        targets_l = batch.targets_Bl[0]
        counted = targets_l != IGNORE_INDEX
        rows = torch.stack(
            [
                -scores.log_likelihood_N.cpu().double()[counted],
                torch.ones(int(counted.sum()), dtype=torch.float64),
                bytes_per_token_V[targets_l[counted]].double(),
            ],
            dim=1,
        )
        sums.index_add_(0, context_sizes(batch, layout, ring_rank)[counted], rows)
        if on_sample:
            on_sample(1)
    sums = loaded.groups.sum(sums.to(loaded.device)).cpu()
    check_finite(sums[:, _LOSS])
    return sums


def context_sizes(batch: Batch, layout: Layout, ring_rank: int) -> torch.Tensor:
    """Return how many tokens each of this rank's tokens may see, itself included: (l,) int64.

    ``batch`` has one sample. Windows of single layers are not considered.
    """
    positions_l = layout.positions(ring_rank)
    if batch.document_starts is None:
        return positions_l + 1
    starts = batch.document_starts
    document_l = torch.searchsorted(starts, positions_l, right=True) - 1
    return positions_l - starts[document_l] + 1


def bucket_edges(length: int, width: int) -> list[int]:
    """Return where buckets of contexts 1 to ``length`` begin, and the end of the last one.

    Equal widths, or doubling ones where ``width`` is 0: 1, 2, 3 to 4, 5 to 8 and so on, so that a
    power of two ends a bucket. The last bucket may be narrower.
    """
    if width:
        return [*range(1, length + 1, width), length + 1]
    ends = [2**n for n in range((length - 1).bit_length())]
    return [1, *(end + 1 for end in ends), length + 1]


def _curve(
    length: int, documents: DocumentsKind, samples: int, sums: torch.Tensor, width: int
) -> Curve:
    edges = bucket_edges(length, width)
    buckets = [_bucket(first, end - 1, sums[first:end].sum(0)) for first, end in pairwise(edges)]
    return Curve(length, documents, samples, _bucket(1, length, sums.sum(0)), buckets)


def _bucket(first: int, last: int, sums: torch.Tensor) -> Bucket:
    loss, tokens, text_bytes = sums.tolist()
    return Bucket(
        first,
        last,
        int(tokens),
        loss / tokens if tokens else None,
        bits_per_byte(loss, int(text_bytes)) if text_bytes else None,
    )


def table(curve: Curve) -> str:
    """Return the lines of a curve: a heading, and one line for each bucket."""
    lines = [
        f"length {curve.length:,}, documents {curve.documents}, {curve.samples:,} samples",
        f"{'context':>17}{'tokens':>14}{'loss':>9}{'bits/byte':>11}",
    ]
    rows = [(_range(bucket), bucket) for bucket in curve.buckets]
    for name, bucket in [*rows, ("all", curve.total)]:
        loss, bits = (
            "-" if value is None or math.isnan(value) else f"{value:.4f}"
            for value in (bucket.loss, bucket.bits_per_byte)
        )
        lines.append(f"{name:>17}{bucket.tokens:>14,}{loss:>9}{bits:>11}")
    return "\n".join(lines)


def _range(bucket: Bucket) -> str:
    if bucket.first == bucket.last:
        return f"{bucket.first:,}"
    return f"{bucket.first:,} to {bucket.last:,}"
