"""Every option, once: a field here is the YAML key and the command-line flag, and the text under it is its help.

Default < YAML (``--config``) < flag. Names are Megatron's where Megatron has one. Zero means "derived" only where the
help says so. This file checks what one section can know of itself; what sections ask of one another, of the processes
and of the device is checked by settings/setup.py. Nothing is clamped or repaired in silence.
"""

import contextlib
import difflib
import math
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from megatron_ring import other_names, untrusted
from megatron_ring.errors import ConfigError, flag, nearest_multiples, not_positive


def _self_test(words: list[str]) -> str:
    if len(words) > 1:
        raise ValueError("takes one word or none")
    return words[0] if words else "only"


# The flag without a word stands for "only".
_ALONE_ONLY = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[{start,only,none}]",
    instance_from_str=_self_test,
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
    choices=("start", "only", "none"),
)


def _shares(given: str | list[Any]) -> tuple[float, ...]:
    """The shares of --split, in words of their own or with commas between them, as Megatron has them."""
    if not isinstance(given, str | list):
        raise ValueError("takes numbers in a list, or text with commas between them")
    words = given.split(",") if isinstance(given, str) else given
    parts = [part for word in words for part in str(word).split(",") if part.strip()]
    if len(parts) not in (2, 3):
        raise ValueError("takes two or three shares: training, validation and test")
    return tuple(map(float, parts))


_SHARES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="SHARE SHARE [SHARE]",
    instance_from_str=_shares,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [f"{share:g}" for share in value],
)


def _window(given: str | int | list[Any]) -> int:
    """--window-size: keys, or Megatron's pair LEFT,RIGHT of tokens before and after each token; -1 is all before.

    LEFT does not count the token itself: 1024,0 is a window of 1,025 keys.
    """
    words = given if isinstance(given, list) else [given]
    numbers = [
        int(part) for word in words for part in str(word).strip("()").split(",") if part.strip()
    ]
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != 2 or numbers[0] < -1 or numbers[1] not in (-1, 0):
        raise ValueError(
            "takes the number of keys W that a token sees, itself among them, or LEFT,0 as Megatron has it, which is "
            "W = LEFT + 1; -1,0 is no window. A token sees none after it, so RIGHT must be 0"
        )
    return numbers[0] + 1


_WINDOW = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="INT|LEFT,0",
    instance_from_str=_window,
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)

# Options that YAML too takes in other forms than their type.
_FORMS = {"split": lambda given: list(_shares(given)), "window_size": _window}

# ``int | str`` is the one, and the other as soon as a Literal is among them.
_UNIONS = (UnionType, Union)


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int = 4
    """Transformer blocks."""
    hidden_size: int = 256
    """Width E of the residual stream."""
    ffn_hidden_size: int = 0
    """Width F of the feed-forward. 0: 4 x hidden for gelu; 8/3 x hidden, up to a multiple of 64, for swiglu."""
    num_attention_heads: int = 4
    """Query heads H."""
    num_query_groups: int = 0
    """Key-value heads G of grouped-query attention. 0: as many as query heads."""
    kv_channels: int = 0
    """Size D of a head, of queries, keys and values alike. 0: hidden_size / num_attention_heads."""
    qk_layernorm: bool = False
    """Normalise every query and key head over D before RoPE, with weights that the heads share, as in Qwen 3."""
    window_size: Annotated[int, _WINDOW] = 0
    """Sliding window W: a token sees itself and the W - 1 before it. 0: everything before it. Megatron's pair LEFT,0
    counts the tokens before it alone: 1024,0 is W = 1025, and -1,0 is 0."""
    window_attn_skip_freq: int = 0
    """N: one layer that attends fully after every N - 1 with the window. 0: every layer has the window."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    """off-by-one adds a sink, a key of score 0 and no value, to every softmax; learnable learns its score by head."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights. Only 0 as yet: no hop kernel computes it."""
    attn_logit_softcapping: float = 0.0
    """Bound that a tanh puts on the scores, as in Gemma 2. Only 0 as yet: no hop kernel computes it."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """RMSNorm is Llama's, LayerNorm is GPT-2's."""
    norm_epsilon: float = 1e-5
    """Added to the variance before the root."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward: swiglu is Llama's, gelu (tanh form) is GPT-2's."""
    add_bias_linear: bool = False
    """Biases in the linear layers, as in GPT-2."""
    add_qkv_bias: bool = False
    """Biases in the projections to queries, keys and values, and in no other linear layer, as in Qwen 2."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """rope turns queries and keys; learned_absolute adds a table of seq_length rows to the embedding."""
    rotary_base: float = 10000.0
    """RoPE's theta."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How RoPE is stretched beyond the length the model was first trained on."""
    rope_scaling_factor: float = 1.0
    """New length over old length, for every rope_scaling but none."""
    rope_original_length: int = 0
    """The length the model was first trained on, for yarn and llama3. 0: seq_length / rope_scaling_factor."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output head weights of its own instead of the embedding's."""
    padded_vocab_size: int = 0
    """Rows V of embedding and head, where they are more than the tokenizer's ids, as in many published models. 0: as
    many."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it over sqrt(2 x num_layers)."""

    @property
    def head_dim(self) -> int:
        """D, with the default resolved."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """G, with the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """F, with the default resolved."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return (
            -(-self.hidden_size * 8 // 3 // 64) * 64
            if self.activation == "swiglu"
            else 4 * self.hidden_size
        )

    def vocabulary_size(self, token_ids: int) -> int:
        """V, for a tokenizer that has so many ids; raises ConfigError where they are more than the rows."""
        if self.padded_vocab_size and self.padded_vocab_size < token_ids:
            raise ConfigError(
                f"padded_vocab_size {self.padded_vocab_size} has no row for the last of the tokenizer's {token_ids} "
                f"ids: it must be at least {token_ids}, or 0. Set --padded-vocab-size, or --tokenizer-model."
            )
        return self.padded_vocab_size or token_ids

    def window_of(self, layer: int) -> int:
        """The window of a layer, counted from 0; 0 where it attends fully: layers N - 1, 2N - 1, ... as in Megatron."""
        attends_fully = self.window_attn_skip_freq and (layer + 1) % self.window_attn_skip_freq == 0
        return 0 if attends_fully else self.window_size

    def problems(self) -> list[str]:
        if found := _unusable(self):
            return found
        found = not_positive(
            self, "num_layers", "hidden_size", "num_attention_heads", "norm_epsilon", "rotary_base"
        )
        found += _negative(
            self,
            "padded_vocab_size",
            "ffn_hidden_size",
            "num_query_groups",
            "rope_original_length",
            "init_method_std",
        )
        found += _negative(self, "kv_channels", "window_size", "window_attn_skip_freq")
        # What divides what can be said of legal sizes alone.
        found = found or self._head_problems()
        return found + self._bias_problems() + self._rope_problems() + self._window_problems()

    def _head_problems(self) -> list[str]:
        """The first of them: the next would only follow from it."""
        hidden, heads, groups = self.hidden_size, self.num_attention_heads, self.key_value_heads
        if not self.kv_channels and hidden % heads:
            return [
                f"hidden_size {hidden} does not divide into {heads} attention heads. Nearest: "
                f"{nearest_multiples(hidden, heads)}. Set --hidden-size or --num-attention-heads, or give heads a size "
                "of their own, --kv-channels."
            ]
        if heads % groups:
            return [
                f"num_query_groups {groups} does not divide num_attention_heads {heads}. "
                f"Legal: {', '.join(map(str, _divisors(heads)))}. Set --num-query-groups."
            ]
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            whence = (
                "kv_channels"
                if self.kv_channels
                else f"hidden_size {hidden} / num_attention_heads {heads}"
            )
            return [
                f"head size {self.head_dim} ({whence}) is odd, and RoPE turns pairs. Nearest: "
                f"{nearest_multiples(self.head_dim, 2)}. Set --kv-channels, or "
                "--position-embedding-type learned_absolute."
            ]
        return []

    def _bias_problems(self) -> list[str]:
        if not (self.add_qkv_bias and self.add_bias_linear):
            return []
        return [
            "add_qkv_bias has no effect beside add_bias_linear, which gives every linear layer a bias, those of "
            "queries, keys and values too. Leave out --add-qkv-bias, or --add-bias-linear."
        ]

    def _rope_problems(self) -> list[str]:
        found = []
        if self.rope_scaling != "none" and self.rope_scaling_factor <= 1:
            found.append(
                f"rope_scaling {self.rope_scaling} stretches by rope_scaling_factor {self.rope_scaling_factor}, which "
                "must be greater than 1. Set --rope-scaling-factor, or --rope-scaling none."
            )
        if self.rope_scaling == "none" and self.rope_scaling_factor != 1:
            found.append(
                f"rope_scaling_factor {self.rope_scaling_factor} has no effect while rope_scaling is none. "
                "Set --rope-scaling linear (or ntk, yarn, llama3)."
            )
        if self.rope_original_length and self.rope_scaling not in ("yarn", "llama3"):
            found.append(
                f"rope_original_length {self.rope_original_length} has no effect while rope_scaling is "
                f"{self.rope_scaling}. Set --rope-scaling yarn or llama3, or --rope-original-length 0."
            )
        if self.rope_scaling != "none" and self.position_embedding_type != "rope":
            found.append(
                f"rope_scaling {self.rope_scaling} has no effect while position_embedding_type is "
                f"{self.position_embedding_type}. Set --rope-scaling none, or --position-embedding-type rope."
            )
        return found

    def _window_problems(self) -> list[str]:
        found = []
        if self.window_attn_skip_freq > 0 and self.window_size == 0:
            found.append(
                f"window_attn_skip_freq {self.window_attn_skip_freq} has no effect while window_size is 0. "
                "Set --window-size, or --window-attn-skip-freq 0."
            )
        if self.window_attn_skip_freq == 1 and self.window_size > 0:
            found.append(
                f"window_size {self.window_size} has no effect while window_attn_skip_freq is 1, which has every layer "
                "attend fully. Set --window-attn-skip-freq to at least 2 or to 0, or --window-size 0."
            )
        return found


@dataclass(frozen=True)
class ParallelConfig:
    context_parallel: Literal["none", "ring", "striped", "zigzag"] = "none"
    """Layout: where a token lives. ring: contiguous shards; striped: dealt like cards; zigzag: early with late."""
    context_parallel_size: int = 0
    """Processes N that split one sequence. 0: all that tensor and pipeline leave (1 with --context-parallel none)."""
    ulysses_degree: int = 1
    """U of N = R x U: processes within a ring member that trade heads for sequence. 1 is a pure ring."""
    stripe_size: int | Literal["auto"] = "auto"
    """Neighbouring tokens in a stripe of the striped layout; 1 as in the paper. auto: as wide as the kernel likes."""
    context_parallel_reduction: Literal["arrival", "invariant"] = "arrival"
    """In which order a ring adds up. arrival: as its hops bring it; invariant: in one that the sample sets, so that
    attention has the same bits on rings of 1, 2, 4 and 8 ranks; for striped single tokens, and slower."""
    attention_kernel: Literal["auto", "flash", "cudnn", "sdpa", "triton", "reference"] = "auto"
    """What computes a hop: Dao's flash-attn, cuDNN, torch's fused attention, the kernel of this package, plain torch.
    auto takes the fastest, as measured, that this device, dtype, head size and mask allow, and says why."""
    tensor_model_parallel_size: int = 1
    """Processes T that split every layer."""
    sequence_parallel: bool = False
    """Megatron's word: tensor ranks also share out the tokens between their layers. It splits no attention."""
    pipeline_model_parallel_size: int = 1
    """Processes P that split the layers among them."""
    ring_timeout: int = 600
    """Seconds that a rank waits for a neighbour in the ring; then all say where they are and the job ends with exit
    code 76. Take more than the longest that one lets others wait: to load, save, compile. Time in which the process is
    suspended does not count. 0: no limit."""
    world_size: int = 0
    """Processes this config is meant for: what --dry-run plans with, and what a run is checked against. 0: any."""

    def problems(self) -> list[str]:
        sizes = ["ulysses_degree", "tensor_model_parallel_size", "pipeline_model_parallel_size"]
        sizes += ["stripe_size"] if self.stripe_size != "auto" else []
        return not_positive(self, *sizes) + _negative(
            self, "context_parallel_size", "ring_timeout", "world_size"
        )


@dataclass(frozen=True)
class DataConfig:
    data_path: tuple[str, ...] = ()
    """Token store P for P.bin and P.idx (Megatron's format), or a blend of stores with the weight of each before it:
    0.7 A 0.3 B (in YAML the weights too are text). None given: the source text of Python's own library."""
    tokenizer_model: str = ""
    """The sentencepiece model or tokenizer.json the stores were written with. Empty: the one beside the first."""
    split: Annotated[tuple[float, float] | tuple[float, float, float], _SHARES] = (0.98, 0.02)
    """Shares of the documents, in the order of the store, of each store of a blend: for training, for validation and,
    of three, for a test, which is evaluated as validation is, but once, after the last step, at any --eval-interval.
    Of any sum: 969,30,1 is 0.969 0.03 0.001. A share of 0 leaves its part out."""
    seq_length: int = 1024
    """Tokens S of a sample, before it is split over the context ranks."""
    packing: Literal["concatenate", "greedy", "best-fit"] = "concatenate"
    """Documents in a sample: cut where it ends, or whole (if they fit), as they come or as fills it best."""
    reset_attention_mask: bool = False
    """A token sees only its own document, which its end-of-document token closes, and not all of the sample."""
    reset_position_ids: bool = False
    """The positions that the model is given restart at 0 with each document."""
    eod_mask_loss: bool = False
    """An end-of-document token predicts nothing, so that no loss crosses from one document to the next."""

    def problems(self) -> list[str]:
        found = not_positive(self, "seq_length")
        # So that nan is refused too.
        if not (
            all(share >= 0 for share in self.split)
            and self.split[0] > 0
            and sum(self.split) < math.inf
        ):
            found.append(
                f"split {self.split} must be two or three shares (training, validation, test) that are numbers, none "
                "below 0, the first above 0. Set --split."
            )
        return found + self._blend_problems()

    @property
    def shares(self) -> tuple[float, ...]:
        """split, divided by its sum unless that is 1."""
        return (
            self.split
            if self.split_adds_up_to_1
            else tuple(share / sum(self.split) for share in self.split)
        )

    @property
    def split_adds_up_to_1(self) -> bool:
        """Whether split was given as shares of one whole; up to the rounding of decimal fractions."""
        return abs(sum(self.split) - 1) <= 1e-6

    @property
    def blend(self) -> dict[str, Fraction]:
        """Prefix of each token store -> its weight, exactly as written; weights have any sum."""
        if len(self.data_path) == 1:
            return {self.data_path[0]: Fraction(1)}
        return {
            prefix: Fraction(weight)
            for weight, prefix in zip(self.data_path[::2], self.data_path[1::2])
        }

    def _blend_problems(self) -> list[str]:
        count, prefixes = len(self.data_path), self.data_path[1::2]
        nameless = [word for word in (prefixes or self.data_path) if not Path(word).name]
        if nameless:
            return [
                f"data_path has {nameless[0]!r}, which names no store: it is the P of P.bin. Set --data-path."
            ]
        if count < 2:
            return []
        if count % 2:
            return [
                f"data_path has {count} words: it takes one store, or stores with the weight of each before it, as in "
                "0.7 A 0.3 B, an even number of words. Set --data-path."
            ]
        return [
            f"data_path has {weight!r} before {prefix}, where its weight belongs, a number above 0. Set --data-path."
            for weight, prefix in zip(self.data_path[::2], prefixes)
            if not _is_weight(weight)
        ] + [
            f"data_path names {prefix} {prefixes.count(prefix)} times: add its weights up. Set --data-path."
            for prefix in dict.fromkeys(prefixes)
            if prefixes.count(prefix) > 1
        ]


def _is_weight(word: str) -> bool:
    """Whether it is a number above 0. Written with an exponent, it must be one that a float has."""
    try:
        # Fraction computes 10**e, which takes hours and all memory for 1e999999999.
        has_exponent = "e" in word.lower()
        return (
            len(word) <= 100
            and (not has_exponent or 0 < float(word) < math.inf)
            and Fraction(word) > 0
        )
    except (ValueError, ZeroDivisionError):
        return False


@dataclass(frozen=True)
class TrainingConfig:
    train_iters: int = 200
    """Optimizer steps."""
    micro_batch_size: int = 1
    """Sequences B that one data rank takes through the model at once."""
    global_batch_size: int = 0
    """Sequences of one optimizer step over all data ranks. 0: micro_batch_size x data ranks, no accumulation."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of cosine or linear decay."""
    lr_warmup_iters: int = 20
    """Steps of linear warm-up from 0."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""
    lr_decay_iters: int = 0
    """Steps, warm-up included, after which the learning rate has reached min_lr and stays there. Independent of
    train_iters, so that a run that is continued with more steps keeps its schedule. 0: train_iters."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's first moment."""
    adam_beta2: float = 0.95
    """AdamW's second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    seed: int = 1234
    """Everything random follows from it: initial weights and the order of samples."""
    deterministic: bool = False
    """The same bits from run to run, on the same devices and as many of them. Kernels and operators that add up in
    another order each time are refused."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type. auto: bf16 where the device multiplies it natively, else fp32; never fp16 on a CPU."""
    fused_operations: Literal["auto", "torch", "liger", "flash-attn", "apex"] = "auto"
    """The library that computes norms, RoPE, SwiGLU and the cross entropy, as far as it can, and torch the rest. auto:
    torch, but on CUDA for each the first of liger, flash-attn, apex that is installed. docs/fused.md has the table."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO over data x context ranks: 1 splits optimizer state, 2 gradients too, 3 parameters too."""
    eval_interval: int = 100
    """Steps between validations; there is one before the first step and one after the last. 0: none at all; a test
    share of --split is evaluated all the same."""
    eval_iters: int = 8
    """Global batches of one validation, and of the test."""
    deepspeed: tyro.conf.Suppress[tyro.conf.Fixed[dict[str, Any]]] = field(default_factory=dict)
    """YAML only: extra keys for DeepSpeed's own config. It may not repeat a key that is derived from these options."""

    @property
    def decay_horizon(self) -> int:
        """The step at which cosine or linear decay reaches min_lr: lr_decay_iters, or by default train_iters."""
        return self.lr_decay_iters or self.train_iters

    def problems(self) -> list[str]:
        found = not_positive(
            self, "train_iters", "micro_batch_size", "eval_iters", "lr", "adam_eps"
        )
        found += _negative(
            self, "global_batch_size", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad"
        )
        found += _negative(self, "lr_decay_iters")
        found += _negative(self, "seed", "eval_interval")
        found += [
            f"{name} {beta} must be at least 0 and below 1. Set {flag(name)}."
            for name in ("adam_beta1", "adam_beta2")
            if not 0 <= (beta := getattr(self, name)) < 1
        ]
        if self.min_lr > self.lr:
            found.append(f"min_lr {self.min_lr} is above lr {self.lr}. Set --min-lr or --lr.")
        if self.lr_decay_style == "constant" and self.lr_decay_iters > 0:
            found.append(
                f"lr_decay_iters {self.lr_decay_iters} has no effect while lr_decay_style is constant. "
                "Set --lr-decay-iters 0, or --lr-decay-style cosine or linear."
            )
        if self.lr_decay_style != "constant" and self.lr_warmup_iters >= self.decay_horizon:
            name = "lr_decay_iters" if self.lr_decay_iters else "train_iters"
            later = f", --lr-decay-iters to at least {self.lr_warmup_iters + 1}" * bool(
                self.lr_decay_iters
            )
            found.append(
                f"lr_warmup_iters {self.lr_warmup_iters} leaves nothing of {name} {self.decay_horizon} to decay. "
                f"Set --lr-warmup-iters to at most {self.decay_horizon - 1}{later}, or --lr-decay-style constant."
            )
        return found


@dataclass(frozen=True)
class MemoryConfig:
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again. selective: all but products and attention; full: all but attention."""
    recompute_attention: bool = False
    """With --recompute full: attention too, so that the ring runs twice and a layer keeps its input alone."""
    mlp_chunks: int = 1
    """Pieces of the sequence that the feed-forward takes in turn; more than 1 has each computed again backward."""
    loss_chunk_size: int = 1024
    """Tokens whose logits exist at a time; head and cross entropy are one step. 0: all at once."""
    offload_activations: bool = False
    """Keep what backward needs of each layer in CPU memory, and fetch it back ahead of its use. GPUs only."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where DeepSpeed keeps and updates the optimizer's state; cpu needs ZeRO 1, 2 or 3."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where DeepSpeed keeps parameters that are not in use; cpu needs ZeRO 3."""

    def problems(self) -> list[str]:
        found = not_positive(self, "mlp_chunks") + _negative(self, "loss_chunk_size")
        if self.recompute_attention and self.recompute != "full":
            found.append(
                f"recompute_attention has no effect while recompute is {self.recompute}. "
                "Set --recompute full, or leave --recompute-attention out."
            )
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    save: str = ""
    """Folder to write checkpoints to. Empty: none are written."""
    load: str = ""
    """Folder to resume from: the newest whole checkpoint in it is taken, or the folder of one checkpoint, which is then
    the one. A run starts from random weights if the folder is empty, or is --save and has no checkpoint yet."""
    finetune: bool = False
    """Take the weights alone from --load, for a new run: step 0, first sample, new optimizer; RoPE, windows and length
    may be others. Once --save holds a checkpoint, the run goes on from that, so that it may be started again as it was.
    """
    allow_other_data: bool = False
    """Resume although --data-path names other tokens than the checkpoint's run has read: a store that was prepared
    anew, added or left out. The run goes on at the same sample number, which may be a text that was read before."""
    save_interval: int = 0
    """Steps between checkpoints; with --save there is always one after the last step. 0: only that one."""
    async_save: bool = False
    """Copy a checkpoint aside, into CPU memory, and write it while training goes on. The next one waits for it."""
    keep_last: int = 0
    """K: once a new checkpoint is whole, those before the last K are deleted; K + 1 need room. 0: all are kept."""
    keep_every: int = 0
    """M: with --keep-last, checkpoints of steps that are multiples of M are kept beside the last K. 0: none are."""

    def problems(self) -> list[str]:
        found = _negative(self, "save_interval", "keep_last", "keep_every")
        if self.save_interval and not self.save:
            found.append(f"save_interval {self.save_interval} has nowhere to write to. Set --save.")
        if self.finetune and not self.load:
            found.append("finetune has no weights to begin with while load is empty. Set --load.")
        if self.allow_other_data and not self.load:
            found.append(
                "allow_other_data has no effect while load is empty. Set --load, or leave --allow-other-data out."
            )
        if self.finetune and self.load and self.load == self.save:
            found.append(
                f"finetune makes a new run of the weights in load {self.load}, and save is the same folder, whose "
                "checkpoints are the old run's. Set --save to another folder."
            )
        if self.async_save and not self.save:
            found.append(
                "async_save has nothing to write while save is empty. Set --save, or leave --async-save out."
            )
        if self.keep_last > 0 and not self.save:
            found.append(
                f"keep_last {self.keep_last} has no effect while save is empty. Set --save, or --keep-last 0."
            )
        if self.keep_every > 0 and self.keep_last == 0:
            found.append(
                f"keep_every {self.keep_every} has no effect while keep_last is 0, which keeps all. "
                "Set --keep-last, or --keep-every 0."
            )
        return found


@dataclass(frozen=True)
class GuardsConfig:
    on_bad_step: Literal["skip", "roll-back", "stop"] = "skip"
    """What follows a bad step: its loss or gradient norm is not finite, or its loss is a spike. No weight moves in it.
    skip: the next step, so that a bad text or a passing fault costs no more than one; roll-back: the newest checkpoint
    is loaded, and the samples since are left out; stop: the run ends with exit code 6."""
    max_bad_steps: int = 10
    """More than so many bad steps since the start, or since the last checkpoint that a good step preceded, end the run
    with exit code 6: what goes on is no passing fault."""
    loss_spike_factor: float = 0.0
    """A loss above this many times the median of the last good steps' is a spike, from the 17th good step on; 1.5 to 2
    lets noise pass. Where losses rise for good, max_bad_steps ends the run. 0: no loss is a spike."""
    loss_spike_window: int = 128
    """Good steps whose losses that median is of; a checkpoint keeps them."""

    def problems(self) -> list[str]:
        found = _negative(self, "max_bad_steps", "loss_spike_factor")
        if 0 < self.loss_spike_factor <= 1:
            found.append(
                f"loss_spike_factor {self.loss_spike_factor} would refuse every other step: it must be above 1, or 0 "
                "for no limit. Set --loss-spike-factor."
            )
        if self.loss_spike_window < 16:
            found.append(
                f"loss_spike_window {self.loss_spike_window} is too short for a median that a spike does not move: it "
                "must be at least 16. Set --loss-spike-window."
            )
        return found


@dataclass(frozen=True)
class LoggingConfig:
    log_interval: int = 10
    """Steps between lines on the console."""
    metrics_file: str = ""
    """Write one JSON object a step to this file, and the loss as loss.png beside it. Empty: none.
    A resumed run continues the file; lines of steps that it runs again go to FILE.superseded. A run
    from step 0 moves an existing file to FILE.1, FILE.2, ... and never over another file."""
    tensorboard_dir: str = ""
    """Write TensorBoard events to this folder. Empty: none."""
    wandb_project: str = ""
    """Report to this Weights & Biases project; WANDB_MODE=offline works. Empty: none."""
    csv_dir: str = ""
    """Write one csv file a metric to this folder. Empty: none."""
    straggler_threshold: float = 1.25
    """Warn, once per log interval, of a rank that computes this many times as long in its hops of the ring as ranks do
    on average with such work; one that is named again and again is slow. Waits do not count. 0: nobody looks. On CPU
    alone, where the host itself waits."""
    profile_ring: bool = False
    """Tell of each step, in the metrics file, what every hop of the ring computed, waited and sent and how even it was
    over ranks, and on the console the shares of attention, exposed communication, data and optimizer. On CPU alone."""
    profile_ring_trace: str = ""
    """With --profile-ring, write a trace of a few steps of all ranks to this file, for https://ui.perfetto.dev and
    chrome://tracing; some 3 KB a hop, layer, pass and rank. Empty: none."""
    profile_ring_steps: int = 2
    """Steps in that trace, from the third that this run takes."""

    def problems(self) -> list[str]:
        found = not_positive(self, "log_interval", "profile_ring_steps")
        if not (self.straggler_threshold == 0 or 1 < self.straggler_threshold < math.inf):
            found.append(
                f"straggler_threshold {self.straggler_threshold} must be above 1, the mean, or 0 for none. "
                "Set --straggler-threshold."
            )
        if Path(self.metrics_file).name == "loss.png":
            found.append(
                f"metrics_file {self.metrics_file} is where the plot of the loss is drawn. "
                "Set --metrics-file to another name, as metrics.jsonl."
            )
        if self.metrics_file and self.profile_ring_trace == self.metrics_file:
            found.append(
                f"profile_ring_trace {self.profile_ring_trace} is the metrics file too. "
                "Set --profile-ring-trace or --metrics-file to another file."
            )
        if self.profile_ring_trace and not self.profile_ring:
            found.append(
                f"profile_ring_trace {self.profile_ring_trace} has no effect without profile_ring. "
                "Set --profile-ring, or leave --profile-ring-trace out."
            )
        return found


@dataclass(frozen=True)
class Config:
    """Pretrain a GPT whose attention is split over the sequence by a ring."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    config: str = ""
    """YAML file of sections and keys; flags go over it."""
    dry_run: bool = False
    """Print the resolved config and the plan, start nothing, and leave."""
    self_test: Annotated[Literal["start", "only", "none"], _ALONE_ONLY] = "start"
    """Ranks prove that they are each other's neighbours and attend exactly, and time their links. start: in one line
    before training, where they are several; only, or --self-test without a word: report and leave; none: leave it out.
    That options, code and data are the same on all ranks is checked in any case."""

    def problems(self) -> list[str]:
        """Everything that is wrong within the sections, each with rule, remedy and flag."""
        if found := self.unusable_values():
            return found
        return [problem for section in self._sections() for problem in section.problems()]

    def unusable_values(self) -> list[str]:
        """Numbers and text that no option can have, whatever its rule is: see ``_unusable``."""
        return [problem for section in self._sections() for problem in _unusable(section)]

    def _sections(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self) if is_dataclass(getattr(self, f.name))]


def parse(arguments: list[str], console: bool = True) -> Config:
    """Default < YAML < flag. Raises ConfigError for a bad file.

    A bad flag ends the program with exit code 2, and says why and which flags are near it if ``console``; of flags of
    Megatron and of transformers what they are called here.
    """
    base = load_yaml(path) if (path := _config_path(arguments)) else Config()
    flags = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(tyro.conf.AvoidSubcommands[Config])
    try:
        return tyro.cli(
            flags, default=base, args=arguments, description=Config.__doc__, console_outputs=console
        )
    except SystemExit as leaving:
        if leaving.code and console:
            given = dict.fromkeys(argument for argument in arguments if argument.startswith("--"))
            print(
                *filter(None, map(other_names.hint, given)), sep="\n", file=sys.stderr, flush=True
            )
        raise


def load_yaml(path: str | Path, remedy: str = "Set --config.") -> Config:
    """Read a config file of sections. ``remedy`` is what a message says of a file that is not one.

    Raises ConfigError that names every key that is unknown, of another type, or out of range.
    """
    with untrusted.errors_as(ConfigError, f"config {path}", remedy):
        tree = untrusted.parse_yaml(untrusted.read_bytes(Path(path), untrusted.CONFIG_BYTES)) or {}
    problems: list[str] = []
    config = _filled(Config(), tree, str(path), problems)
    problems += [f"{path}: {problem}" for problem in config.unusable_values()]
    if problems:
        raise ConfigError(problems)
    return config


_NEAREST_NAMED = 30
_LONGEST_KEY = 100


def to_yaml(config: Config) -> str:
    """The whole config as YAML, itself a valid ``--config``."""
    tree = {name: value for name, value in asdict(config).items() if isinstance(value, dict)}
    return yaml.safe_dump(_plain(tree), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _config_path(arguments: list[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return ""


def _filled(section: Any, tree: Any, where: str, problems: list[str]) -> Any:
    """``section`` with the values of ``tree``; what does not fit is added to ``problems``."""
    hints = get_type_hints(type(section))
    known = [f.name for f in fields(section)]
    if tree is None:
        return section  # a heading with nothing under it
    if not isinstance(tree, dict):
        problems.append(f"{where}: expected keys and values, found {untrusted.shown(tree)}.")
        return section
    changed = {}
    for key, value in tree.items():
        if key not in known:
            nearest = _nearest(str(key), known) if len(problems) < _NEAREST_NAMED else ""
            problems.append(f"{where}: unknown key {untrusted.shown(key)}.{nearest}")
        elif is_dataclass(current := getattr(section, key)):
            changed[key] = _filled(current, value, f"{where}: {key}", problems)
        else:
            try:
                changed[key] = _typed(_FORMS[key](value) if key in _FORMS else value, hints[key])
            except (OverflowError, TypeError, ValueError):
                problems.append(
                    f"{where}: {key} is {untrusted.shown(value)}, not {_described(hints[key])}."
                )
    return replace(section, **changed)


def _nearest(key: str, known: list[str]) -> str:
    if hint := other_names.hint(key):
        return f" {hint}"
    everywhere = {name: known for name in known}
    for section in fields(Config):
        if section.default_factory is not None and is_dataclass(section.type):
            everywhere |= {f.name: f"{section.name}.{f.name}" for f in fields(section.type)}
    close = difflib.get_close_matches(key[:_LONGEST_KEY], everywhere, n=1)
    if not close:
        return f" Known here: {', '.join(known)}."
    place = close[0] if close[0] in known else everywhere[close[0]]
    return f" Did you mean {place}?"


def _typed(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` has it, or ValueError. YAML reads 3e-4 as text, so text is tried as a number."""
    origin = get_origin(hint)
    if origin is Literal:
        if (type(value), value) not in [(type(choice), choice) for choice in get_args(hint)]:
            raise ValueError
        return value
    if origin is tuple:
        inner = get_args(hint)
        items = value if isinstance(value, list) else [value]
        if Ellipsis not in inner and len(items) != len(inner):
            raise ValueError
        return tuple(_typed(item, inner[0]) for item in items)
    if origin in _UNIONS:
        return _typed_as_one_of(value, get_args(hint))
    if origin is dict:
        return _plain_values(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _plain_values(value: Any) -> Any:
    """``value`` with nothing in it but what JSON has, which is what DeepSpeed takes; or TypeError."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {
            key: inner if _is_plain(inner) else _plain_values(inner) for key, inner in value.items()
        }
    raise TypeError


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            _is_plain(inner) or (isinstance(inner, dict) and _plain_values(inner))
            for inner in value
        )
    return value is None or isinstance(value, str | int | float)


def _typed_as_one_of(value: Any, hints: tuple) -> Any:
    for hint in hints:
        with contextlib.suppress(TypeError, ValueError):
            return _typed(value, hint)
    raise ValueError


def _described(hint: Any) -> str:
    if get_origin(hint) in _UNIONS:
        return " or ".join(_described(inner) for inner in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"a list of {'' if Ellipsis in inner else f'{len(inner)} '}{inner[0].__name__}"
    return f"of type {getattr(hint, '__name__', hint)}"


_LARGEST = {"seed": untrusted.LARGEST_INTEGER, "num_layers": 2**16, "world_size": 2**17}
"""The largest magnitude of a whole number by option; 2**31 - 1 of the others."""


def _unusable(section: Any) -> list[str]:
    """Return what is wrong with values that arithmetic, formatting or the file system would fail on.

    These are whole numbers beyond a limit, numbers that are not finite, and text with a NUL.
    """
    found = []
    for name in (f.name for f in fields(section)):
        value = getattr(section, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) > (limit := _LARGEST.get(name, 2**31 - 1)):
                found.append(
                    f"{name} {untrusted.shown(item)} must be a whole number of at most {limit}. Set {flag(name)}."
                )
            elif isinstance(item, float) and not math.isfinite(item):
                found.append(f"{name} {item} must be a finite number. Set {flag(name)}.")
            elif isinstance(item, str) and not _is_utf8_without_nul(item):
                found.append(
                    f"{name} {untrusted.shown(item)} must be text without NUL. Set {flag(name)}."
                )
    return found


def _is_utf8_without_nul(text: str) -> bool:
    # A file's name that is not UTF-8 has half surrogates in the place of its bytes, and a console cannot show them.
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _negative(section: Any, *names: str) -> list[str]:
    values = {name: getattr(section, name) for name in names}
    return [
        f"{name} {value} must not be below 0. Set {flag(name)}."
        for name, value in values.items()
        if not value >= 0
    ]
