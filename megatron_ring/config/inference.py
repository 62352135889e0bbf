"""The options of programs that use a trained model: which one, how it is split, what it generates.

An option that training has too has its name and its values here.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ring.config.checks import negative, unusable_values
from megatron_ring.errors import flag, not_positive


@dataclass(frozen=True)
class InferenceConfig:
    """A trained model, and how its sequence and weights are split over processes."""

    load: str = ""
    """Folder of the model: a --save folder, of which the newest complete checkpoint is used, a
    checkpoint itself, written on any grid, or a Hugging Face folder of a supported family."""
    tokenizer_model: str = ""
    """Tokenizer of the model: a sentencepiece model or a tokenizer.json. Empty: the one in the
    model's folder, or beside the token store that the checkpoint's run has read."""
    prepend_bos: Literal["auto", "on", "off"] = "auto"
    """Whether a text begins with the tokenizer's begin-of-sentence token. auto: as in the token
    store that the model was trained on, or as the tokenizer does."""
    context_parallel: Literal["none", "ring", "striped", "zigzag"] = "striped"
    """Layout of a sequence over the ranks of a ring. With striped single tokens the cache stays
    balanced to one token however long the generation; ring: contiguous shards; zigzag: each rank
    has a chunk of the first half and the mirrored one of the second; none: sequences are not
    split."""
    context_parallel_size: int = 0
    """Number of processes that split one sequence. 0: all that tensor parallelism leaves, or 1 with
    --context-parallel none."""
    stripe_size: int = 1
    """Stripe size of the striped layout, in tokens."""
    tensor_model_parallel_size: int = 1
    """Tensor-parallel size T: number of processes that split every layer."""
    pipeline_model_parallel_size: int = 1
    """Must be 1. A checkpoint of a pipeline loads on any other grid."""
    ulysses_degree: int = 1
    """Must be 1. The context ranks form one ring, which holds the cache."""
    attention_kernel: Literal["auto", "flash", "cudnn", "sdpa", "triton", "reference"] = "auto"
    """Attention kernel of a hop, as in training. auto: the fastest, as measured, that supports the
    device, dtype, head dim and packed documents."""
    fused_operations: Literal["auto", "torch", "triton", "liger", "flash-attn", "apex"] = "auto"
    """Library that computes norms, RoPE and SwiGLU, as in training."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute dtype, of weights and cache. auto: bf16 if the device multiplies it natively, else
    fp32. fp16 needs CUDA."""
    seq_length: int = 0
    """Most positions of a prompt with its continuation. 0: those that the model was trained on, or
    stretched to. More is possible with RoPE only, and quality then depends on the model. Its RoPE
    scaling is stored with it and cannot be changed here: --rope-scaling is an option of training
    and of tools/convert_checkpoint.py import."""
    prefill_chunk_size: int = 0
    """Tokens of a prompt that are computed at a time, over all ranks, which bounds the activations.
    0: the whole prompt at once."""
    world_size: int = 0
    """Number of processes: --dry-run plans with it, and a run must have it. 0: any number."""
    dry_run: bool = False
    """Print the model, the grid and the memory of a rank, and exit without starting anything."""

    def problems(self) -> list[str]:
        """Return all problems that do not depend on the model or the number of processes."""
        if unusable := unusable_values(self):
            return unusable
        problems = not_positive(self, "stripe_size", "tensor_model_parallel_size")
        problems += negative(
            self, "context_parallel_size", "seq_length", "prefill_chunk_size", "world_size"
        )
        if not self.load:
            problems.append(
                "load is empty, and there is no model without it. Set --load to a --save folder, a "
                "checkpoint or a Hugging Face folder."
            )
        if self.pipeline_model_parallel_size != 1:
            problems.append(
                f"pipeline_model_parallel_size {self.pipeline_model_parallel_size} is not possible "
                "at inference: every rank has all layers. Legal: 1. A checkpoint loads on another "
                "grid than it was written on. Set --pipeline-model-parallel-size 1, and split "
                "weights that do not fit one device with --tensor-model-parallel-size."
            )
        if self.ulysses_degree != 1:
            problems.append(
                f"ulysses_degree {self.ulysses_degree} is not possible at inference: the cache of "
                "a sequence is split over one ring. Legal: 1. Set --ulysses-degree 1; the same "
                "processes then form a longer ring."
            )
        return problems


@dataclass(frozen=True)
class GenerationConfig:
    """What is generated: prompts, lengths, and how tokens are chosen."""

    prompt: str = ""
    """A text to continue."""
    prompt_file: str = ""
    """A file of UTF-8 text to continue, as it is, the newline at its end included."""
    prompts_jsonl: str = ""
    """A file with a JSON object a line, each with a text to continue as "prompt". Other keys are
    copied to the output, and must not be those of a result."""
    output: str = ""
    """A new file for one JSON object a prompt, in their order: prompt, text, token_ids, stop_reason
    and counts. Empty: text is streamed to stdout, or with --prompts-jsonl the objects are."""
    max_new_tokens: int = 128
    """Most tokens to generate for a prompt. Generation also stops at the end of the document."""
    temperature: float = 0.0
    """Divides the logits before a token is sampled. 0: greedy, the most probable token."""
    top_k: int = 0
    """Sample from the k most probable tokens. 0: all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens that have at least this probability together,
    after --top-k. 1: all."""
    seed: int = 1234
    """Seed of the sampling. A token's noise depends on it, the number of the prompt, the position
    and the token, so the same seed gives the same text on any number of ranks."""
    batch_size: int = 1
    """Prompts that are generated at a time."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        if unusable := unusable_values(self):
            return unusable
        problems = not_positive(self, "max_new_tokens", "batch_size")
        problems += negative(self, "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p} must be above 0 and at most 1. Set --top-p.")
        if self.temperature == 0:
            for name, given in (("top_k", self.top_k > 0), ("top_p", self.top_p < 1)):
                if given:
                    problems.append(
                        f"{name} {getattr(self, name)} has no effect with temperature 0, which is "
                        f"greedy. Set --temperature above 0, or leave out {flag(name)}."
                    )
        return problems + self._source_problems()

    def _source_problems(self) -> list[str]:
        sources = ("prompt", "prompt_file", "prompts_jsonl")
        given = [name for name in sources if getattr(self, name)]
        if len(given) > 1:
            return [
                f"{' and '.join(given)} are given, and one source of prompts is possible. Set one "
                f"of {', '.join(map(flag, sources))}."
            ]
        if self.batch_size > 1 and given and given != ["prompts_jsonl"]:
            return [
                f"batch_size {self.batch_size} has no effect with {given[0]}, which is one prompt. "
                "Set --batch-size 1, or --prompts-jsonl."
            ]
        return []
