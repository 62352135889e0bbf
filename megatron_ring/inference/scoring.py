"""Log-likelihoods of given tokens, by the forward pass of training over the ring, without a cache.

A sequence is padded to what its layout needs, so it may have any length. Sequences of different
lengths are packed as the documents of one sample: they attend only to themselves, their positions
begin at 0, and little is computed for padding. The head runs in chunks of tokens, so the logits of
a long sequence never exist at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.data.loader import Batch
from megatron_ring.errors import ConfigError
from megatron_ring.inference.loading import Loaded, OpenedModel
from megatron_ring.inference.memory import RankMemory, Work, rank_memory
from megatron_ring.kernels.cross_entropy import TokenScores, head_token_scores
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.tensor import vocabulary_part
from megatron_ring.plan.memory_report import human

_HEAD_CHUNK_TOKENS = 1024  # as --loss-chunk-size by default
# The logits of a chunk in their own dtype, in float32 and exponentiated, and the candidates' ids.
_BYTES_PER_LOGIT = 20


@dataclass(frozen=True)
class Scores:
    """Scores of the tokens of a sequence after its first, each given those before it.

    Both are (n - 1,), on the CPU. log_likelihood: float32, in nats. is_greedy: whether the token is
    the one that greedy decoding would choose.
    """

    log_likelihood: torch.Tensor
    is_greedy: torch.Tensor


def layout_for(loaded: Loaded, tokens: int) -> Layout:
    """Return the layout of a sample of at least ``tokens`` tokens over the model's ring."""
    return Layout.of_at_least(tokens, loaded.layout_name, loaded.grid.ring, loaded.stripe_size)


def scoring_memory(opened: OpenedModel, tokens: int) -> RankMemory:
    """Count the memory of a rank for a sample of ``tokens`` tokens: there is no cache."""
    settings = opened.settings
    rows = -(-opened.vocab_size // settings.grid.tensor)
    chunk = min(_HEAD_CHUNK_TOKENS, -(-tokens // settings.grid.ring))
    logits = chunk * rows * _BYTES_PER_LOGIT
    return replace(rank_memory(opened, Work((tokens,), 1)), cache=0, logits=logits)


def check_memory(needed: RankMemory, available: int | None, remedy: str) -> None:
    """Raise ConfigError if a rank needs more than ``available`` bytes; ``remedy`` names a flag."""
    if available is not None and needed.total > available:
        raise ConfigError(
            f"a rank needs {human(needed.total)}, of which the weights have "
            f"{human(needed.weights)}, and {human(available)} are free. Set {remedy}, or start "
            "more ranks: a sample is split over the ring."
        )


@torch.no_grad()
def score_batch(loaded: Loaded, layout: Layout, batch: Batch) -> TokenScores:
    """Return the scores of the targets of this rank's tokens, samples end to end, on the device.

    Collective over all ranks, which have the tokens that ``layout`` assigns to them; blocks.
    """
    model = loaded.model
    with _attention(model, ContextParallelAttention(layout, loaded.kernel, loaded.groups)):
        hidden_BlE = model.hidden(
            batch.tokens_Bl.to(loaded.device),
            batch.positions.to(loaded.device),
            batch.document_starts,
        )
    weight_vE = model.output_weight_VE
    return head_token_scores(
        hidden_BlE.flatten(0, 1),
        weight_vE,
        batch.targets_Bl.flatten().to(loaded.device),
        _HEAD_CHUNK_TOKENS,
        vocabulary_part(weight_vE, model.tensor),
    )


def token_log_likelihoods(
    loaded: Loaded,
    sequences: Sequence[Sequence[int]],
    on_pack: Callable[[int, int], object] | None = None,
) -> list[Scores]:
    """Return the scores of each sequence, on every rank.

    Collective over all ranks, which must pass the same sequences; blocks. A pack has at most as
    many tokens as the model has positions. ``on_pack`` is called after each with the number of
    sequences done and that of all. Raises ConfigError, before anything is computed, for a sequence
    longer than the model's positions and for a token id outside the vocabulary; after a pack, for
    log-likelihoods that are nan or infinite.
    """
    check_sequences(loaded, sequences)
    scores: list[Scores] = []
    for pack in _packs(sequences, loaded.seq_length):
        scores += _score_pack(loaded, pack)
        if on_pack:
            on_pack(len(scores), len(sequences))
    return scores


def check_finite(log_likelihoods: torch.Tensor) -> None:
    """Raise ConfigError if one is nan or infinite; does not communicate."""
    if not log_likelihoods.isfinite().all():
        raise ConfigError(
            "log-likelihoods are nan or infinite, although the weights are not: the dtype's range "
            "does not hold the model's activations. Set --dtype bf16 or fp32."
        )


def check_sequences(loaded: Loaded, sequences: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError for sequences that the model cannot score; does not communicate."""
    longest = max(map(len, sequences), default=0) - 1
    if longest > loaded.seq_length:
        raise ConfigError(
            f"a sequence of {longest + 1} tokens is too long: all but the last need a position, "
            f"and the model has {loaded.seq_length}. Use at most {loaded.seq_length + 1} tokens, "
            "or set --seq-length, which a model with RoPE can extend."
        )
    ids = {token for sequence in sequences for token in sequence}
    outside = sorted(token for token in ids if not 0 <= token < loaded.vocab_size)
    if outside:
        raise ConfigError(
            f"token id {outside[0]} is outside the model's vocabulary, 0 to "
            f"{loaded.vocab_size - 1}: the tokenizer is another one. Set --tokenizer-model."
        )


@contextlib.contextmanager
def _attention(model: GPT, attention: ContextParallelAttention) -> Iterator[None]:
    """Give all layers this attention function, and their own again afterwards."""
    layers = [block.attention for block in model.blocks.values()]
    before = [layer.attention for layer in layers]
    for layer in layers:
        layer.attention = attention
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            layer.attention = own


def _packs(sequences: Sequence[Sequence[int]], most_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Yield consecutive sequences that together need at most ``most_tokens`` positions."""
    pack: list[Sequence[int]] = []
    tokens = 0
    for sequence in sequences:
        needed = max(0, len(sequence) - 1)
        if pack and tokens + needed > most_tokens:
            yield pack
            pack = []
            tokens = 0
        pack.append(sequence)
        tokens += needed
    if pack:
        yield pack


def _score_pack(loaded: Loaded, sequences: Sequence[Sequence[int]]) -> list[Scores]:
    lengths = [max(0, len(sequence) - 1) for sequence in sequences]
    tokens = sum(lengths)
    if not tokens:
        return [Scores(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) for _ in sequences]
    layout = layout_for(loaded, tokens)
    ring_rank = dist.get_rank(loaded.groups.ring_links[0]) if loaded.groups.ring_links else 0
    positions_l = layout.positions(ring_rank)
    local = score_batch(loaded, layout, _batch(sequences, layout.seq_length, positions_l))
    both_2S = torch.zeros(2, layout.seq_length, device=loaded.device)
    both_2S[:, positions_l.to(loaded.device)] = torch.stack(
        [local.log_likelihood_N.float(), local.is_greedy_N.float()]
    )
    log_likelihood_S, is_greedy_S = loaded.groups.sum(both_2S).cpu()[:, :tokens]
    check_finite(log_likelihood_S)
    return [
        Scores(log_likelihood, is_greedy)
        for log_likelihood, is_greedy in zip(
            log_likelihood_S.split(lengths), (is_greedy_S > 0.5).split(lengths)
        )
    ]


def _batch(sequences: Sequence[Sequence[int]], seq_length: int, positions_l: torch.Tensor) -> Batch:
    """Return the tokens at ``positions_l`` of the sequences end to end, padded to ``seq_length``.

    Padding is after all text. In a pack of several sequences it is a document of its own, whose
    positions do not exceed those of the longest sequence.
    """
    scored = [sequence for sequence in sequences if len(sequence) > 1]
    lengths = torch.tensor([len(sequence) - 1 for sequence in scored])
    padding = seq_length - int(lengths.sum())
    tokens_S = torch.tensor([t for sequence in scored for t in sequence[:-1]] + [0] * padding)
    targets_S = torch.tensor(
        [t for sequence in scored for t in sequence[1:]] + [IGNORE_INDEX] * padding
    )
    positions_S = torch.cat([*map(torch.arange, lengths.tolist()), torch.zeros(padding)]).long()
    starts = None
    if len(scored) > 1:
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        starts = starts[: len(scored) + (padding > 0)]
    return Batch(
        tokens_S[None, positions_l], targets_S[None, positions_l], positions_S[positions_l], starts
    )
