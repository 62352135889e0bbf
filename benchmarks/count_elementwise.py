"""Count the memory traffic of one layer, forward and backward, beside the least possible.

    python -m benchmarks.count_elementwise
    python -m benchmarks.count_elementwise --fused-operations torch --json F
    python -m benchmarks.count_elementwise --ring-size 4 --recompute selective

The model runs on the meta device as it would on CUDA, at full size and without a GPU: the same
operators, of which only the sizes are counted (benchmarks/memory_traffic.py). One layer is the
difference between a model of two layers and one of one; the rest is the embedding, the angles of
RoPE, the final norm, the head and the loss.

Element-wise traffic is all but attention and matrix products. The least possible takes these as
given: products and attention read their operands in any strides, write their results in the dtype
of the model, and a product can add to its result. In between, each group of element-wise
operations reads what it needs once and writes once what a product, attention or a later group
needs. Per token, with E hidden, F feed-forward, H and G query and key-value heads of D:

forward      residual add and norm: 4 E, twice; RoPE: 2 (H + G) D; SwiGLU: 3 F
backward     SwiGLU: 5 F; RoPE: 2 (H + G) D; norm and residual add: 4 E, twice
selective    again for the gradients of weights: the norms' results, 2 E each, and SwiGLU's, F
full         as selective, and RoPE 2 (H + G) D and the residual add, 2 E, before the second norm

Left out are the norms' weights and statistics and the angles, which are under 1%. For a ring of
several ranks the ring operator's own traffic, that of its hops' results and of their messages, is
counted and has no least here.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import tyro

from benchmarks.common import DTYPES, check_outputs, commit, table_head, table_row, write_json
from benchmarks.memory_traffic import (
    ATTENTION,
    CATEGORIES,
    PRODUCTS,
    Counts,
    MemoryTraffic,
    Traffic,
)
from megatron_ring.config import MemoryConfig, ModelConfig, load_yaml
from megatron_ring.context_parallel import attention as ring_operator
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.attention import ContextParallelAttention, RingSpec
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError, not_positive, reporting_errors
from megatron_ring.kernels.attention import KERNELS
from megatron_ring.kernels.fused.choose_libraries import choose
from megatron_ring.kernels.fused.libraries import Operation
from megatron_ring.kernels.fused.operations import Operations
from megatron_ring.kernels.norm import normalize
from megatron_ring.model.gpt import GPT
from megatron_ring.monitoring.non_finite import NonFiniteDetector
from megatron_ring.parallel.collectives import ProcessGroups

MOVED = tuple(category for category in CATEGORIES if category not in (ATTENTION, PRODUCTS))
"""The categories that count as element-wise traffic."""

LLAMA_1_3B = ModelConfig(
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5504,
    num_attention_heads=16,
    untie_embeddings_and_output_weights=True,
)

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Options:
    config: str = ""
    """YAML file whose model is counted. Empty: a Llama of 1.3 billion parameters."""
    tokens: int = 32768
    """Tokens of a rank."""
    vocab_size: int = 4096
    """Vocabulary size."""
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    """Recomputation modes to count."""
    fused_operations: Literal["triton", "torch"] = "triton"
    """Library of the fused operations. Liger's and flash-attn's do not run on the meta device."""
    attention_kernel: Literal["cudnn", "sdpa"] = "cudnn"
    """Attention kernel. Triton's and flash-attn's do not run on the meta device."""
    ring_size: int = 1
    """Ranks of the ring. Messages of several are simulated; their packing is counted."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the model."""
    operators: int = 0
    """Also print this many operators with the most traffic in a layer."""
    json: str = ""
    """Also write the results to this file."""


@dataclass(frozen=True)
class LayerCount:
    """The traffic of one layer and of the rest of the model, forward and backward."""

    recompute: Recompute
    forward: Counts
    backward: Counts
    rest: Counts

    @property
    def moved(self) -> Traffic:
        """Element-wise traffic of the layer, forward and backward."""
        return self.forward.total(MOVED) + self.backward.total(MOVED)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json)
    if problems := not_positive(options, "tokens", "vocab_size", "ring_size"):
        raise ConfigError(problems)
    if not options.recompute:
        raise ConfigError("recompute is empty, and must have at least one value. Set --recompute.")
    model = load_yaml(options.config).model if options.config else LLAMA_1_3B
    operations, libraries = chosen_operations(options, model)
    print(f"{options.tokens} tokens, {options.dtype}, {options.attention_kernel} attention")
    print(*libraries, sep="\n")
    print()
    print(table_head(_COLUMNS))
    findings = []
    for recompute in options.recompute:
        count = count_layer(options, model, operations, recompute)
        least = least_elements(model, recompute) * DTYPES[options.dtype].itemsize
        if options.ring_size > 1:
            least = None
        for row in _rows(count, least, options.tokens):
            print(table_row(row))
        findings.append(_findings(count, least, options.tokens))
        _print_operators(count, options)
    findings = {
        "commit": commit(),
        "torch": torch.__version__,
        "options": asdict(options),
        "libraries": libraries,
        "layers": findings,
    }
    write_json(options.json, findings)


def chosen_operations(options: Options, model: ModelConfig) -> tuple[Operations, list[str]]:
    """Return the fused operations that a run on CUDA uses, and a line for each library."""
    required = {
        Operation.RMS_NORM: model.normalization == "RMSNorm",
        Operation.LAYER_NORM: model.normalization == "LayerNorm",
        Operation.ROPE: model.position_embedding_type == "rope",
        Operation.SWIGLU: model.activation == "swiglu",
        Operation.CROSS_ENTROPY: True,
    }
    choices = choose(
        options.fused_operations,
        "cuda",
        DTYPES[options.dtype],
        [operation for operation, is_required in required.items() if is_required],
    )
    operations = choices.operations
    if operations.norm is normalize and model.normalization == "RMSNorm":
        operations = replace(operations, norm=_rms_norm_as_on_cuda)
    return operations, choices.describe()


def least_elements(model: ModelConfig, recompute: Recompute) -> int:
    """Return the least elements read and written for each token in one layer, as derived above."""
    stream = model.hidden_size
    rotated = 2 * (model.num_attention_heads + model.key_value_heads) * model.head_dim
    inner = model.feed_forward_size
    forward = 2 * 4 * stream + rotated + 3 * inner
    backward = 2 * 4 * stream + rotated + 5 * inner
    again = {
        "none": 0,
        "selective": 2 * 2 * stream + inner,
        "full": 2 * 2 * stream + inner + rotated + 2 * stream,
    }
    return forward + backward + again[recompute]


# ---- counting ----


def count_layer(
    options: Options, model: ModelConfig, operations: Operations, recompute: Recompute
) -> LayerCount:
    """Count the traffic of one layer: the difference between models of two layers and of one."""
    one, two = (
        _count_model(options, replace(model, num_layers=layers), operations, recompute)
        for layers in (1, 2)
    )
    forward, backward = (longer - shorter for longer, shorter in zip(two, one))
    rest = Counts()
    for of_one, of_layer in zip(one, (forward, backward)):
        for key, traffic in (of_one - of_layer).traffic.items():
            rest.traffic[key] += traffic
    return LayerCount(recompute, forward, backward, rest)


def _count_model(
    options: Options, model: ModelConfig, operations: Operations, recompute: Recompute
) -> tuple[Counts, Counts]:
    """Return the traffic of a whole model's forward and backward pass."""
    attention = ContextParallelAttention(
        Layout("none", options.tokens, 1), options.attention_kernel, ProcessGroups()
    )
    memory = MemoryConfig(recompute=recompute)
    with torch.device("meta"):
        gpt = GPT(
            model,
            options.vocab_size,
            options.tokens,
            attention,
            operations=operations,
            memory=memory,
        ).to(DTYPES[options.dtype])
        # As in a run, the outputs and gradients of blocks and attention are checked for nan.
        NonFiniteDetector(gpt, torch.device("meta"))
        tokens = torch.empty((1, options.tokens), dtype=torch.int64)
        positions = torch.empty(options.tokens, dtype=torch.int64)
    forward, backward = (MemoryTraffic(_ring_bodies(options.ring_size)) for _ in range(2))
    with forward:
        loss = gpt(tokens, positions, None, tokens)
    with backward:
        loss.backward()
    return forward.counts, backward.counts


def _ring_bodies(ring_size: int) -> dict[Any, Callable]:
    """Return the ring operators' bodies, so that what they run is counted and not they."""

    def ring(q_BLHD: torch.Tensor, spec: RingSpec) -> ring_loop.Ring:
        name = "none" if ring_size == 1 else "striped"
        return ring_loop.Ring(
            layout=Layout(name, q_BLHD.shape[1] * ring_size, ring_size),
            ring_rank=ring_size // 2,
            kernel=KERNELS[spec.kernel],
            scale=q_BLHD.shape[-1] ** -0.5,
            exchange=_SimulatedExchange() if ring_size > 1 else None,
            splits_own_work=False,
        )

    def forward(q_BLHD, kv_2BLGD, document_starts, progress, names, sizes):
        spec = RingSpec.from_op_arguments(names, sizes)
        return ring_loop.forward(q_BLHD, kv_2BLGD, ring(q_BLHD, spec))

    def backward(dout, dlse, q_BLHD, kv_2BLGD, out, lse, starts, progress, names, sizes):
        spec = RingSpec.from_op_arguments(names, sizes)
        dq, dkv = ring_loop.backward(dout, dlse, q_BLHD, kv_2BLGD, out, lse, ring(q_BLHD, spec))
        return dq.to(q_BLHD.dtype), dkv.to(kv_2BLGD.dtype)

    return {
        ring_operator.ring_attention._opoverload: forward,
        ring_operator.ring_attention_backward._opoverload: backward,
    }


class _SimulatedExchange:
    """An exchange whose messages arrive at once; what is received has the form of what is sent."""

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "_Received":
        return _Received(torch.empty_like(tensor))


@dataclass(frozen=True)
class _Received:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


# Torch's RMSNorm is one kernel in each direction on CUDA, and a dozen operators on the meta device.


@torch.library.custom_op("megatron_ring_benchmarks::rms_norm", mutates_args=())
def _rms_norm(x_BlE: torch.Tensor, weight_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("only counted, on the meta device")


@torch.library.custom_op("megatron_ring_benchmarks::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy_BlE: torch.Tensor, x_BlE: torch.Tensor, weight_E: torch.Tensor, rstd_Bl: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("only counted, on the meta device")


@_rms_norm.register_fake
def _(x_BlE, weight_E):
    return torch.empty_like(x_BlE), x_BlE.new_empty(x_BlE.shape[:-1], dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(dy_BlE, x_BlE, weight_E, rstd_Bl):
    return torch.empty_like(x_BlE), torch.empty_like(weight_E)


class _RMSNormAsOnCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BlE, weight_E):
        y_BlE, rstd_Bl = _rms_norm(x_BlE, weight_E)
        ctx.save_for_backward(x_BlE, weight_E, rstd_Bl)
        return y_BlE

    @staticmethod
    def backward(ctx, dy_BlE):
        return _rms_norm_backward(dy_BlE, *ctx.saved_tensors)


def _rms_norm_as_on_cuda(x_BlE, weight_E, bias_E, epsilon):
    return _RMSNormAsOnCuda.apply(x_BlE, weight_E)


# ---- output ----

_COLUMNS = (
    "recompute",
    "category",
    "calls",
    "read, KB a token",
    "written, KB a token",
    "least, KB a token",
    "of the least",
)


def _rows(count: LayerCount, least: int | None, tokens: int) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows for one recomputation mode."""
    for category in CATEGORIES:
        traffic = count.forward.total([category]) + count.backward.total([category])
        if traffic.calls:
            yield count.recompute, category, *_cells(traffic, tokens), "", ""
    moved = count.moved
    yield (
        count.recompute,
        "**all element-wise**",
        *_cells(moved, tokens),
        f"{least / 1e3:.1f}" if least else "",
        f"**{moved.bytes / tokens / least:.2f}**" if least else "",
    )
    rest = count.rest.total(MOVED)
    yield count.recompute, "element-wise outside of layers", *_cells(rest, tokens), "", ""


def _cells(traffic: Traffic, tokens: int) -> tuple[str, str, str]:
    read, written = (f"{x / tokens / 1e3:.1f}" for x in (traffic.read, traffic.written))
    return str(traffic.calls), read, written


def _print_operators(count: LayerCount, options: Options) -> None:
    for direction, counts in (("forward", count.forward), ("backward", count.backward)):
        ordered = sorted(counts.traffic.items(), key=lambda item: -item[1].bytes)
        for (category, name), traffic in ordered[: options.operators]:
            if category in MOVED and traffic.calls:
                cells = _cells(traffic, options.tokens)
                print(f"    {direction:9}{category:22}{name:34}", *(f"{x:>8}" for x in cells))


def _findings(count: LayerCount, least: int | None, tokens: int) -> dict[str, Any]:
    """Return one mode's results for the JSON file, in bytes for each token."""

    def per_token(counts: Counts, categories: tuple[str, ...]) -> dict[str, float]:
        traffic = counts.total(categories)
        return {
            "calls": traffic.calls,
            "read": traffic.read / tokens,
            "written": traffic.written / tokens,
        }

    parts = {"forward": count.forward, "backward": count.backward, "outside": count.rest}
    return {
        "recompute": count.recompute,
        "bytes_per_token": {
            part: {category: per_token(counts, (category,)) for category in CATEGORIES}
            for part, counts in parts.items()
        },
        "elementwise": count.moved.bytes / tokens,
        "least": least,
        "of_least": count.moved.bytes / tokens / least if least else None,
    }


if __name__ == "__main__":
    with reporting_errors():
        main()
