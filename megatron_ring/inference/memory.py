"""The memory of a rank at inference, counted before anything large is allocated.

Weights and cache are exact for a striped cache of single tokens. Activations are counted where a
layer needs the most, without the workspace of kernels and the memory of libraries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ring.errors import ConfigError, counted
from megatron_ring.inference.cache import CacheShape
from megatron_ring.inference.generation import cache_capacity
from megatron_ring.inference.loading import OpenedModel
from megatron_ring.model.shapes import element_count, layer_shapes, parameter_shapes
from megatron_ring.plan.memory_report import human

_FP32 = torch.float32.itemsize
# Tensors of the vocabulary's size that sampling has at once, in float64: scores, sorted scores,
# probabilities, sums, noise and its words.
_SAMPLING_TENSORS = 8
_FP64 = torch.float64.itemsize


@dataclass(frozen=True)
class Work:
    """One batch: the tokens of its prompts, and what is done with them.

    chunk_size: tokens of a prefill chunk over all samples and ranks, 0 for all of them. samples:
    whether tokens are sampled rather than chosen greedily.
    """

    prompt_lengths: tuple[int, ...]
    max_new_tokens: int
    chunk_size: int = 0
    samples: bool = False

    @property
    def capacities(self) -> list[int]:
        """Tokens that are cached for each sample."""
        return [cache_capacity(length, self.max_new_tokens) for length in self.prompt_lengths]

    @property
    def chunk(self) -> int:
        """Tokens of the largest prefill chunk."""
        total = sum(self.prompt_lengths)
        return min(self.chunk_size or total, total)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that has most. activations: of a prefill chunk. logits: of a batch."""

    weights: int
    cache: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Activations and logits are not needed at the same time."""
        return self.weights + self.cache + max(self.activations, self.logits)


def rank_memory(opened: OpenedModel, work: Work) -> RankMemory:
    """Count the memory of a rank for a batch."""
    dtype = opened.settings.precision.dtype
    shapes = parameter_shapes(
        opened.model_config, opened.vocab_size, opened.trained_length, opened.settings.grid.tensor
    )
    samples = len(work.prompt_lengths)
    # The whole vocabulary twice: as gathered from the tensor ranks, and in order.
    logits = 2 * samples * opened.vocab_size * _FP32
    if work.samples:
        logits += _SAMPLING_TENSORS * samples * opened.vocab_size * _FP64
    return RankMemory(
        weights=element_count(shapes) * dtype.itemsize,
        cache=cache_shape(opened).nbytes(work.capacities, dtype),
        activations=_activations(opened, work),
        logits=logits,
    )


def cache_shape(opened: OpenedModel) -> CacheShape:
    """Return the shape of a cache before the model is loaded."""
    model = opened.model_config
    settings = opened.settings
    return CacheShape(
        windows={layer: model.window_of(layer) for layer in range(model.num_layers)},
        key_value_heads=model.key_value_heads // settings.grid.tensor,
        head_dim=model.head_dim,
        ring_size=settings.grid.ring,
        ring_rank=0,
        layout_name=settings.layout.name,
        stripe_size=settings.layout.stripe_size,
    )


def _activations(opened: OpenedModel, work: Work) -> int:
    """Return the bytes of a prefill chunk in the layer, or half of one, that needs the most."""
    model = opened.model_config
    grid = opened.settings.grid
    size = opened.settings.precision.dtype.itemsize
    shapes = layer_shapes(model, grid.tensor)
    queries = shapes["attention.q_proj.weight"][0]
    keys = shapes["attention.k_proj.weight"][0]
    inner = shapes["mlp.up_proj.weight"][0]
    inner_tensors = 3 if "mlp.gate_proj.weight" in shapes else 2
    # The stream, and its sum with a half block's output.
    stream = 2 * model.hidden_size * size
    # RMSNorm on a CPU, and any norm of half precision, has float32 intermediates.
    norm = model.hidden_size * (size + 2 * _FP32)
    result = queries * _FP32
    # Q, K and V before and after RoPE; the sums of a hop and of all hops, and what is returned.
    attention = model.hidden_size * size + (2 * queries + 3 * keys) * size + 2 * result
    attention += queries * size
    mlp = (inner_tensors * inner + 2 * model.hidden_size) * size
    tokens = -(-work.chunk // grid.ring)
    in_layer = tokens * (stream + max(norm, attention, mlp))
    return in_layer + _messages(opened, work, tokens, queries * (size + _FP32), 2 * keys * size)


def _messages(opened: OpenedModel, work: Work, tokens: int, query_row: int, key_row: int) -> int:
    """Return the bytes sent and received in a hop, and those of a window's keys.

    Keys travel, or the chunk's queries with their results, whichever is fewer bytes.
    """
    ring = opened.settings.grid.ring
    model = opened.model_config
    cached = -(-sum(work.prompt_lengths) // ring)
    seen = 0
    for layer in range(model.num_layers):
        window = model.window_of(layer)
        in_reach = -(-(window + work.chunk) // ring) * len(work.prompt_lengths)
        seen = max(seen, min(cached, in_reach) if window else cached)
    copies = seen * key_row if model.window_size else 0
    if ring == 1:
        return copies
    return copies + 2 * min(seen * key_row, tokens * query_row)


# ---- what there is ----


def available_bytes(device: str, ranks_of_host: int) -> int | None:
    """Return the bytes that this rank may allocate now, None if the system does not say.

    Free memory of its GPU, or its share of the host's.
    """
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free
    limits = [limit for limit in (_available_of_host(), _left_of_cgroup()) if limit is not None]
    return min(limits) // max(1, ranks_of_host) if limits else None


def _available_of_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(number) * 1024 for number in kibibytes), None)


def _left_of_cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container's limit leaves, None without one. Caches of files count as free."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def check_fits(opened: OpenedModel, work: Work, available: int | None) -> None:
    """Raise ConfigError if a batch needs more than ``available`` bytes on a rank."""
    needed = rank_memory(opened, work)
    if available is None or needed.total <= available:
        return
    samples = len(work.prompt_lengths)
    fitting = _longest(
        lambda tokens: (
            rank_memory(
                opened,
                Work((tokens,) * samples, 1, work.chunk_size, work.samples),
            ).total
            <= available
        ),
        max(work.capacities),
    )
    fits = f"a context of {fitting:,} tokens fits" if fitting else "no context fits"
    chunk = "" if work.chunk_size else ", --prefill-chunk-size to bound the activations"
    raise ConfigError(
        f"a rank needs {human(needed.total)}, of which the cache of {samples} "
        f"{'sequence' if samples == 1 else 'sequences'} of up to {max(work.capacities):,} tokens "
        f"has {human(needed.cache)} and the weights {human(needed.weights)}, and {human(available)}"
        f" are free; with {samples} at a time, {fits}. Set --max-new-tokens, --batch-size or a "
        f"shorter prompt{chunk}, or start more ranks: the cache is split over the ring."
    )


def _longest(fits: Callable[[int], bool], upper: int) -> int:
    """Return the largest number up to ``upper`` that ``fits``, 0 if none does; by bisection."""
    lower = 0
    while lower < upper:
        middle = (lower + upper + 1) // 2
        if fits(middle):
            lower = middle
        else:
            upper = middle - 1
    return lower


def memory_lines(opened: OpenedModel, work: Work, available: int | None) -> list[str]:
    """Describe the memory of a rank in lines for the console."""
    memory = rank_memory(opened, work)
    samples = len(work.prompt_lengths)
    of = "sequence" if samples == 1 else "sequences"
    capacity = max(work.capacities)
    free = "unknown" if available is None else human(available)
    windows = sorted(
        {opened.model_config.window_of(n) for n in range(opened.model_config.num_layers)}
    )
    bounded = "".join(f", window {window:,}" for window in windows if window)
    return [
        f"memory           per rank: {human(memory.total)}, and {free} free",
        f"  weights        {human(memory.weights)}",
        f"  cache          {human(memory.cache)} for {samples} {of} of up to {capacity:,} tokens, "
        f"split over {counted(opened.settings.grid.ring, 'ring rank')}{bounded}",
        f"  activations    {human(memory.activations)} in a prefill chunk of "
        f"{counted(work.chunk, 'token', ',')}",
        f"  logits         {human(memory.logits)}",
    ]


def batches_of(lengths: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """Return the prompt lengths of each batch, in order."""
    return [
        tuple(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)
    ]
