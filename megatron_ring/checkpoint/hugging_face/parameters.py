"""Names and shapes of a GPT's parameters by its ModelConfig, as in model/gpt.py on one process.

They are repeated here because checkpoint/ must not import model/; a test compares the two.
"""

from megatron_ring.checkpoint.tensors import Shapes
from megatron_ring.config import ModelConfig


def parameters(model: ModelConfig, vocab_size: int, seq_length: int) -> Shapes:
    """Return the shape of each parameter by name, in the order of the forward pass."""
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
    hidden = model.hidden_size
    bias = model.add_bias_linear
    queries = model.num_attention_heads * model.head_dim
    key_values = model.key_value_heads * model.head_dim
    shapes = _linear("attention.q_proj", queries, hidden, bias or model.add_qkv_bias)
    for name in ("attention.k_proj", "attention.v_proj"):
        shapes |= _linear(name, key_values, hidden, bias or model.add_qkv_bias)
    if model.qk_layernorm:
        for name in ("attention.q_norm", "attention.k_norm"):
            shapes |= _norm(name, model, model.head_dim)
    shapes |= _linear("attention.out_proj", hidden, queries, bias)
    if model.softmax_type == "learnable":
        shapes["attention.sink_H"] = (model.num_attention_heads,)
    return shapes


def _feed_forward(model: ModelConfig) -> Shapes:
    hidden = model.hidden_size
    width = model.feed_forward_size
    bias = model.add_bias_linear
    shapes = {}
    if model.activation == "swiglu":
        shapes |= _linear("mlp.gate_proj", width, hidden, bias)
    shapes |= _linear("mlp.up_proj", width, hidden, bias)
    return shapes | _linear("mlp.down_proj", hidden, width, bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def _norm(name: str, model: ModelConfig, width: int) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (width,)}
    if model.normalization == "LayerNorm":
        shapes[f"{name}.bias"] = (width,)
    return shapes
