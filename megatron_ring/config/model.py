"""The ``model`` section: the architecture of the GPT."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from megatron_ring.config.checks import divisors, negative, unusable_values
from megatron_ring.errors import ConfigError, nearest_multiples, not_positive


def parse_window(given: str | int | list[Any]) -> int:
    """Parse --window-size: a number of keys, or Megatron's pair LEFT,RIGHT; raises ValueError.

    Megatron's LEFT does not count the token itself: 1024,0 is a window of 1025 keys. -1,0 is no
    window.
    """
    words = given if isinstance(given, list) else [given]
    numbers = [
        int(part) for word in words for part in str(word).strip("()").split(",") if part.strip()
    ]
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != 2 or numbers[0] < -1 or numbers[1] not in (-1, 0):
        raise ValueError(
            "expected the number of keys W that a token attends to, itself included, or Megatron's "
            "pair LEFT,0, which is W = LEFT + 1; -1,0 is no window. RIGHT must be 0, because "
            "attention is causal"
        )
    left, _ = numbers
    return left + 1


_WINDOW = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="INT|LEFT,0",
    instance_from_str=parse_window,
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of the GPT."""

    num_layers: int = 4
    """Number of transformer blocks."""
    hidden_size: int = 256
    """Width E of the residual stream."""
    ffn_hidden_size: int = 0
    """Width F of the feed-forward network. 0: 4 x hidden_size for gelu; 8/3 x hidden_size, rounded
    up to a multiple of 64, for swiglu."""
    num_attention_heads: int = 4
    """Number of query heads H."""
    num_query_groups: int = 0
    """Number of key-value heads G, for grouped-query attention. 0: as many as query heads."""
    kv_channels: int = 0
    """Head dim D of queries, keys and values. 0: hidden_size / num_attention_heads."""
    qk_layernorm: bool = False
    """Normalize each query and key head over D before RoPE, with one weight for all heads, as in
    Qwen 3."""
    window_size: Annotated[int, _WINDOW] = 0
    """Sliding-window size W, in keys: a token attends to itself and the W - 1 tokens before it. 0:
    no window. Also accepts Megatron's pair LEFT,0, which excludes the token itself: 1024,0 is W =
    1025, and -1,0 is 0."""
    window_attn_skip_freq: int = 0
    """Every N-th layer uses full attention instead of the window, as in Megatron. 0: all layers use
    the window."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    """Attention sink. off-by-one: add a key of score 0 and value 0 to every softmax; learnable:
    with a learned score for each head; vanilla: no sink."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention weights. Must be 0: no attention kernel supports it
    yet."""
    attn_logit_softcapping: float = 0.0
    """Soft cap of the attention scores by tanh, as in Gemma 2. Must be 0: no attention kernel
    supports it yet."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalization layer: RMSNorm as in Llama, LayerNorm as in GPT-2."""
    norm_epsilon: float = 1e-5
    """Epsilon that the normalization adds to the variance."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward activation: swiglu as in Llama, gelu (tanh form) as in GPT-2."""
    add_bias_linear: bool = False
    """Add biases to all linear layers, as in GPT-2."""
    add_qkv_bias: bool = False
    """Add biases to the query, key and value projections only, as in Qwen 2."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """Position encoding. rope: rotate queries and keys; learned_absolute: add a learned table of
    seq_length rows to the embedding."""
    rotary_base: float = 10000.0
    """RoPE base (theta)."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """Method that extends RoPE beyond the length that the model was first trained on."""
    rope_scaling_factor: float = 1.0
    """New length over original length. Must be above 1 with --rope-scaling, and 1 without."""
    rope_original_length: int = 0
    """Length, in tokens, that the model was first trained on, for yarn and llama3. 0: seq_length /
    rope_scaling_factor."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output head its own weights instead of the embedding's."""
    padded_vocab_size: int = 0
    """Rows V of the embedding and the output head, if more than the tokenizer's vocabulary, as in
    many published models. 0: the tokenizer's vocabulary size."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights. Output projections use it divided by sqrt(2 x
    num_layers)."""

    @property
    def head_dim(self) -> int:
        """The head dim D, with its default resolved."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """The number of key-value heads G, with its default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """The feed-forward width F, with its default resolved."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-self.hidden_size * 8 // 3 // 64) * 64
        return 4 * self.hidden_size

    def vocabulary_size(self, token_ids: int) -> int:
        """Return V for a tokenizer with ``token_ids`` ids.

        Raises ConfigError if padded_vocab_size is smaller.
        """
        if self.padded_vocab_size and self.padded_vocab_size < token_ids:
            raise ConfigError(
                f"padded_vocab_size {self.padded_vocab_size} is smaller than the tokenizer's "
                f"{token_ids} ids: it must be at least {token_ids}, or 0. Set --padded-vocab-size, "
                "or --tokenizer-model."
            )
        return self.padded_vocab_size or token_ids

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, counted from 0; 0 means full attention.

        As in Megatron, layers N - 1, 2N - 1, ... use full attention, where N is
        window_attn_skip_freq.
        """
        frequency = self.window_attn_skip_freq
        uses_full_attention = frequency and (layer + 1) % frequency == 0
        return 0 if uses_full_attention else self.window_size

    @property
    def window_of_all_layers(self) -> int:
        """The window that every layer has; 0 if they have none or not all the same.

        What is decided once for all layers takes 0 then: those without a window have most work.
        """
        return 0 if self.window_attn_skip_freq else self.window_size

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        if unusable := unusable_values(self):
            return unusable
        problems = not_positive(
            self, "num_layers", "hidden_size", "num_attention_heads", "norm_epsilon", "rotary_base"
        )
        problems += negative(
            self,
            "padded_vocab_size",
            "ffn_hidden_size",
            "num_query_groups",
            "rope_original_length",
            "init_method_std",
            "kv_channels",
            "window_size",
            "window_attn_skip_freq",
        )
        # Divisibility is checked for legal sizes only.
        problems = problems or self._head_problems()
        problems += self._bias_problems()
        problems += self._rope_problems()
        return problems + self._window_problems()

    def _head_problems(self) -> list[str]:
        """Return the first problem only, because the others would follow from it."""
        hidden = self.hidden_size
        heads = self.num_attention_heads
        groups = self.key_value_heads
        if not self.kv_channels and hidden % heads:
            return [
                f"hidden_size {hidden} must be a multiple of num_attention_heads {heads}. Nearest: "
                f"{nearest_multiples(hidden, heads)}. Set --hidden-size or --num-attention-heads, "
                "or set the head dim with --kv-channels."
            ]
        if heads % groups:
            return [
                f"num_query_groups {groups} must divide num_attention_heads {heads}. "
                f"Legal: {', '.join(map(str, divisors(heads)))}. Set --num-query-groups."
            ]
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            source = f"hidden_size {hidden} / num_attention_heads {heads}"
            if self.kv_channels:
                source = "kv_channels"
            return [
                f"head dim {self.head_dim} ({source}) must be even, because RoPE rotates pairs. "
                f"Nearest: {nearest_multiples(self.head_dim, 2)}. Set --kv-channels, or "
                "--position-embedding-type learned_absolute."
            ]
        return []

    def _bias_problems(self) -> list[str]:
        if not (self.add_qkv_bias and self.add_bias_linear):
            return []
        return [
            "add_qkv_bias has no effect with add_bias_linear, which adds a bias to every linear "
            "layer, queries, keys and values included. Leave out --add-qkv-bias, or "
            "--add-bias-linear."
        ]

    def _rope_problems(self) -> list[str]:
        problems = []
        if self.rope_scaling != "none" and self.rope_scaling_factor <= 1:
            problems.append(
                f"rope_scaling {self.rope_scaling} needs a rope_scaling_factor above 1, but it is "
                f"{self.rope_scaling_factor}. Set --rope-scaling-factor, or --rope-scaling none."
            )
        if self.rope_scaling == "none" and self.rope_scaling_factor != 1:
            problems.append(
                f"rope_scaling_factor {self.rope_scaling_factor} has no effect with rope_scaling "
                "none. Set --rope-scaling linear (or ntk, yarn, llama3)."
            )
        if self.rope_original_length and self.rope_scaling not in ("yarn", "llama3"):
            problems.append(
                f"rope_original_length {self.rope_original_length} has no effect with rope_scaling "
                f"{self.rope_scaling}. Set --rope-scaling yarn or llama3, or "
                "--rope-original-length 0."
            )
        if self.rope_scaling != "none" and self.position_embedding_type != "rope":
            problems.append(
                f"rope_scaling {self.rope_scaling} has no effect with position_embedding_type "
                f"{self.position_embedding_type}. Set --rope-scaling none, or "
                "--position-embedding-type rope."
            )
        return problems

    def _window_problems(self) -> list[str]:
        problems = []
        if self.window_attn_skip_freq > 0 and self.window_size == 0:
            problems.append(
                f"window_attn_skip_freq {self.window_attn_skip_freq} has no effect with "
                "window_size 0. Set --window-size, or --window-attn-skip-freq 0."
            )
        if self.window_attn_skip_freq == 1 and self.window_size > 0:
            problems.append(
                f"window_size {self.window_size} has no effect with window_attn_skip_freq 1, with "
                "which every layer uses full attention. Set --window-attn-skip-freq to at least 2 "
                "or to 0, or --window-size 0."
            )
        return problems
