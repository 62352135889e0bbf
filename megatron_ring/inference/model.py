"""A GPT with a key-value cache that is sharded over a ring: prefill, then one token at a time."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_ring.errors import ConfigError
from megatron_ring.inference.cache import Cache, CacheShape, chunk_owners
from megatron_ring.inference.decode_attention import DecodeStep
from megatron_ring.inference.loading import Loaded
from megatron_ring.inference.prefill_attention import Chunk, PrefillStep
from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.collectives import ProcessGroups, RingRank
from megatron_ring.parallel.tensor import split_of


class InferenceModel:
    """A GPT whose key-value cache is sharded over a ring of ranks.

    The weights are replicated over the ring and split over tensor ranks. ``prefill``, ``decode``
    and nothing else communicate; both are collective over all ranks of the ring and of the tensor
    group, which must pass the same tokens, and both block.

    Args:
        model: in eval mode, without sequence parallelism; its attention functions are replaced.
        layout_name: how a prompt is distributed over the ring, a name of ``layout.NAMES``; with
            ``stripe_size`` for ``striped``. A generated token at position p goes to ring rank p mod
            R under any layout.
        kernel: of prefill, a key of ``KERNELS``.
    """

    def __init__(
        self,
        model: GPT,
        groups: ProcessGroups,
        *,
        layout_name: str = "striped",
        stripe_size: int = 1,
        kernel: str,
        device: torch.device | str = "cpu",
    ):
        assert not model.tensor.sequence_parallel, "ranks of the residual stream need all tokens"
        self.model = model
        self.ring = RingRank.of(groups.ring_links)
        self.kernel = kernel
        self.device = torch.device(device)
        attention = [block.attention for block in model.blocks.values()]
        self.cache_shape = CacheShape(
            windows={int(layer): block.attention.window for layer, block in model.blocks.items()},
            key_value_heads=attention[0].k_proj.weight.shape[0] // attention[0].head_dim,
            head_dim=attention[0].head_dim,
            ring_size=self.ring.size,
            ring_rank=self.ring.rank,
            layout_name=layout_name,
            stripe_size=stripe_size,
        )
        self._step: PrefillStep | DecodeStep | None = None
        for layer, of_layer in zip(self.cache_shape.windows, attention):
            of_layer.attention = functools.partial(self._attend, layer)

    @staticmethod
    def of(loaded: Loaded) -> "InferenceModel":
        """Return the model that ``loaded`` describes, with its layout, kernel and device."""
        return InferenceModel(
            loaded.model,
            loaded.groups,
            layout_name=loaded.layout_name,
            stripe_size=loaded.stripe_size,
            kernel=loaded.kernel,
            device=loaded.device,
        )

    def new_cache(self, samples: int, capacity: Sequence[int]) -> Cache:
        """Allocate an empty cache.

        ``capacity`` is the most tokens of each sample, prompt and generated ones.
        """
        assert len(capacity) == samples
        return Cache(self.cache_shape, capacity, self.model.embedding.weight.dtype, self.device)

    @torch.no_grad()
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        chunk_size: int = 0,
        on_chunk: Callable[[int, int], object] | None = None,
    ) -> torch.Tensor:
        """Append a prompt, not empty, to each sample of the cache.

        Returns logits_BV in float32 of each sample's last token, on every rank. ``chunk_size`` is
        the most tokens of one forward pass, over all samples and ranks; 0 for all of them.
        ``on_chunk`` is called with the number of tokens computed and that of all.

        Raises ConfigError if a prompt is empty, exceeds the capacity of its sample, or goes beyond
        the model's learned positions; nothing has been computed then.
        """
        assert len(tokens) == cache.samples
        self._check(cache, {sample: len(prompt) for sample, prompt in enumerate(tokens)})
        ends = [length + len(prompt) for length, prompt in zip(cache.lengths, tokens)]
        weight_VE = self.model.embedding.weight
        last_BE = torch.zeros(
            (cache.samples, weight_VE.shape[1]),
            dtype=accumulation_dtype(weight_VE.dtype),
            device=self.device,
        )
        total = sum(map(len, tokens))
        done = 0
        for part in _chunks([torch.as_tensor(prompt) for prompt in tokens], chunk_size or total):
            chunk = self._begin_chunk(cache, part)
            self._prefill_chunk(chunk, cache, ends, last_BE)
            done += sum(map(len, part))
            if on_chunk:
                on_chunk(done, total)
        if self.ring.links is not None:
            # The owner of a last token has its row; all others have zeros.
            dist.all_reduce(last_BE, group=self.ring.links[0])
        return self._logits(last_BE.to(weight_VE.dtype))

    @torch.no_grad()
    def decode(self, tokens: Sequence[int | None], cache: Cache) -> torch.Tensor:
        """Append one token to each sample; None, of which not all may be, leaves one as it is.

        Returns logits_BV in float32 on every rank, zeros for samples without a token. Ranks may
        differ by rounding, so a token that is chosen from them should be chosen on one rank.

        Raises ConfigError if the cache is full, or at the end of the model's learned positions.
        """
        assert len(tokens) == cache.samples
        new = {sample: token for sample, token in enumerate(tokens) if token is not None}
        assert new, "at least one sample needs a token"
        self._check(cache, dict.fromkeys(new, 1))
        positions_B1 = torch.tensor([[cache.lengths[sample]] for sample in new])
        for sample in new:
            owner = cache.lengths[sample] % self.ring.size
            cache.ownership.append(sample, torch.tensor([owner], dtype=torch.int16))
        tokens_B1 = torch.tensor([[token] for token in new.values()])
        step = DecodeStep(list(new), cache, self.ring)
        hidden_B1E = self._hidden(tokens_B1, positions_B1, step)
        logits_BV = self._logits(hidden_B1E[:, 0])
        if len(new) == len(tokens):
            return logits_BV
        all_BV = logits_BV.new_zeros(len(tokens), logits_BV.shape[1])
        all_BV[list(new)] = logits_BV
        return all_BV

    def _hidden(
        self, tokens_Bl: torch.Tensor, positions: torch.Tensor, step: PrefillStep | DecodeStep
    ) -> torch.Tensor:
        """Run the layers on the device, with attention by ``step``; return hidden_BlE."""
        self._step = step
        try:
            return self.model.hidden(tokens_Bl.to(self.device), positions.to(self.device))
        finally:
            self._step = None  # it refers to the cache, which the caller may want to free

    def _attend(
        self,
        layer: int,
        q_BlHD: torch.Tensor,
        k_BlGD: torch.Tensor,
        v_BlGD: torch.Tensor,
        window: int,
        document_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Implement the protocol of attention functions for one layer."""
        return self._step.attend(layer, q_BlHD, k_BlGD, v_BlGD)

    def _begin_chunk(self, cache: Cache, tokens: list[torch.Tensor]) -> Chunk:
        """Assign the next positions of each sample to ranks."""
        shape = cache.shape
        starts = list(cache.lengths)
        for sample, new in enumerate(tokens):
            if len(new):
                owners = chunk_owners(
                    shape.layout_name, shape.stripe_size, shape.ring_size, starts[sample], len(new)
                )
                cache.ownership.append(sample, owners)
        positions = [
            [cache.ownership.positions(sample, rank, start) for sample, start in enumerate(starts)]
            for rank in range(shape.ring_size)
        ]
        return Chunk(starts, tokens, positions)

    def _prefill_chunk(
        self, chunk: Chunk, cache: Cache, ends: list[int], last_BE: torch.Tensor
    ) -> None:
        """Compute this rank's tokens of a chunk.

        Where the last token of a prompt, at ``ends`` - 1, is among them, write its row to ``last``.
        """
        own = chunk.positions[self.ring.rank]
        positions_l = torch.cat(own)
        tokens_l = torch.cat(
            [
                tokens[positions - start]
                for tokens, positions, start in zip(chunk.tokens, own, chunk.starts)
            ]
        )
        if not len(positions_l):
            # A rank without tokens takes part in the exchanges with one that is in no sample.
            positions_l = tokens_l = torch.zeros(1, dtype=torch.int64)
        step = PrefillStep(chunk, cache, self.ring, self.kernel)
        hidden_1lE = self._hidden(tokens_l[None], positions_l, step)
        end = 0
        for sample, positions in enumerate(own):
            end += len(positions)
            if len(positions) and positions[-1] == ends[sample] - 1:
                last_BE[sample] = hidden_1lE[0, end - 1]

    def _logits(self, hidden_BE: torch.Tensor) -> torch.Tensor:
        """Return logits_BV in float32 on every rank; gathers over the tensor group and blocks."""
        logits_Bv = self.model.head(hidden_BE).float()
        split = split_of(self.model.output_weight_VE)
        if split is None:
            return logits_Bv
        tensor = self.model.tensor
        # Parts are equal but for the last ones, which are padded.
        part_Bv = logits_Bv.new_zeros(len(logits_Bv), -(-split.whole // tensor.size))
        part_Bv[:, : logits_Bv.shape[1]] = logits_Bv
        parts = part_Bv.new_empty(tensor.size * len(part_Bv), part_Bv.shape[1])
        dist.all_gather_into_tensor(parts, part_Bv, group=tensor.group)
        return torch.cat(parts.chunk(tensor.size), dim=1)[:, : split.whole]

    def _check(self, cache: Cache, new_tokens: dict[int, int]) -> None:
        """Raise ConfigError if new tokens of some samples cannot be appended."""
        table = self.model.position_embedding
        for sample, tokens in new_tokens.items():
            if not tokens:
                raise ConfigError(
                    f"the prompt of sample {sample} is empty: at least 1 token is needed. Begin it "
                    "with the end-of-document token."
                )
            cache.check_room(sample, tokens)
            end = cache.lengths[sample] + tokens
            if table is not None and end > len(table.weight):
                raise ConfigError(
                    f"sample {sample} would have {end} tokens, but the model has learned "
                    f"{len(table.weight)} positions. Use at most {len(table.weight)} tokens."
                )


def _chunks(prompts: list[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Yield the tokens of each prompt, in order, in chunks of at most ``most`` over all prompts.

    A prompt is finished before the next one begins, so that few chunks attend to its keys.
    """
    offsets = [0] * len(prompts)
    while any(offset < len(prompt) for offset, prompt in zip(offsets, prompts)):
        part = []
        free = most
        for sample, prompt in enumerate(prompts):
            tokens = prompt[offsets[sample] : offsets[sample] + free]
            offsets[sample] += len(tokens)
            free -= len(tokens)
            part.append(tokens)
        yield part
