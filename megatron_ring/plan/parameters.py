"""How many parameters a process holds: its pipeline stage's layers, split over its tensor ranks.

Split are the heads of queries, keys and values, the output projection, the feed-forward's matrices and the rows of the
vocabulary (Shoeybi et al. 2019, section 3); every tensor rank has all of the norms, of the biases behind a sum over
the ranks, and of a learned position table. Where a size does not divide, the first ranks have more: counted is theirs.
"""

from megatron_ring.config import ModelConfig
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.stages import layers_of_stage


def share(whole: int, ranks: int) -> int:
    """The largest part of ``whole`` that one of ``ranks`` has."""
    return -(-whole // ranks)


def parameter_count(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Parameters of the whole model, tied ones once."""
    return parameters_of_stage(model, vocab_size, seq_length, Grid(), stage=0)


def parameters_of_stage(
    model: ModelConfig, vocab_size: int, seq_length: int, grid: Grid, stage: int
) -> int:
    """Parameters of a process on pipeline stage ``stage``. A tied embedding lies on the first stage and on the last."""
    first, last = stage == 0, stage == grid.pipe - 1
    layers = len(layers_of_stage(model.num_layers, grid.pipe, stage))
    tables = int(first) + int(last and (model.untie_embeddings_and_output_weights or not first))
    learned = first and model.position_embedding_type == "learned_absolute"
    return (
        layers * parameters_of_layer(model, grid.tensor)
        + tables * share(vocab_size, grid.tensor) * model.hidden_size
        + learned * seq_length * model.hidden_size
        + last * _norm(model, model.hidden_size)
    )


def parameters_of_layer(model: ModelConfig, tensor_ranks: int) -> int:
    """Parameters of one layer on one of ``tensor_ranks``."""
    norms = 2 * _norm(model, model.hidden_size)
    return _attention(model, tensor_ranks) + _feed_forward(model, tensor_ranks) + norms


def _attention(model: ModelConfig, ranks: int) -> int:
    queries = share(model.num_attention_heads, ranks) * model.head_dim
    key_values = 2 * share(model.key_value_heads, ranks) * model.head_dim
    biases = (model.add_bias_linear or model.add_qkv_bias) * (queries + key_values)
    biases += model.add_bias_linear * model.hidden_size
    sinks = share(model.num_attention_heads, ranks) if model.softmax_type == "learnable" else 0
    norms = 2 * _norm(model, model.head_dim) if model.qk_layernorm else 0
    return model.hidden_size * (2 * queries + key_values) + biases + sinks + norms


def _feed_forward(model: ModelConfig, ranks: int) -> int:
    width, ways_in = share(model.feed_forward_size, ranks), 2 if model.activation == "swiglu" else 1
    biases = model.add_bias_linear * (ways_in * width + model.hidden_size)
    return (ways_in + 1) * model.hidden_size * width + biases


def _norm(model: ModelConfig, size: int) -> int:
    return size * (2 if model.normalization == "LayerNorm" else 1)
