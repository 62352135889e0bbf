"""The parameters of a GPT by its ModelConfig: names and whole shapes, as model/gpt.py has them on one process.

Written down here because checkpoints are below the model; a test compares the two.
"""

from megatron_ring.checkpoint.tensors import Shapes
from megatron_ring.config import ModelConfig


def parameters(model: ModelConfig, vocab_size: int, seq_length: int) -> Shapes:
    """Name -> shape, in the order in which a token meets them."""
    shapes = {"embedding.weight": (vocab_size, model.hidden_size)}
    if model.position_embedding_type == "learned_absolute":
        shapes["position_embedding.weight"] = (seq_length, model.hidden_size)
    for layer in range(model.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _of_layer(model).items()}
    shapes |= _norm("final_norm", model, model.hidden_size)
    if model.untie_embeddings_and_output_weights:
        shapes["output.weight"] = (vocab_size, model.hidden_size)
    return shapes


def _of_layer(model: ModelConfig) -> Shapes:
    shapes = _norm("attention_norm", model, model.hidden_size) | _attention(model)
    return shapes | _norm("mlp_norm", model, model.hidden_size) | _feed_forward(model)


def _attention(model: ModelConfig) -> Shapes:
    hidden, bias = model.hidden_size, model.add_bias_linear
    queries, key_values = (
        n * model.head_dim for n in (model.num_attention_heads, model.key_value_heads)
    )
    shapes = _linear("attention.q_proj", queries, hidden, bias or model.add_qkv_bias)
    for name in ("attention.k_proj", "attention.v_proj"):
        shapes |= _linear(name, key_values, hidden, bias or model.add_qkv_bias)
    for name in ("attention.q_norm", "attention.k_norm") if model.qk_layernorm else ():
        shapes |= _norm(name, model, model.head_dim)
    sinks = (
        {"attention.sink_H": (model.num_attention_heads,)}
        if model.softmax_type == "learnable"
        else {}
    )
    return shapes | _linear("attention.out_proj", hidden, queries, bias) | sinks


def _feed_forward(model: ModelConfig) -> Shapes:
    hidden, width, bias = model.hidden_size, model.feed_forward_size, model.add_bias_linear
    gate = _linear("mlp.gate_proj", width, hidden, bias) if model.activation == "swiglu" else {}
    return (
        gate
        | _linear("mlp.up_proj", width, hidden, bias)
        | _linear("mlp.down_proj", hidden, width, bias)
    )


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, model: ModelConfig, width: int) -> Shapes:
    return {f"{name}.weight": (width,)} | (
        {f"{name}.bias": (width,)} if model.normalization == "LayerNorm" else {}
    )
