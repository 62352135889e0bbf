"""The factors of the parity matrix: options of grid, ZeRO, memory and model, and their configs.

``RunSettings.resolve`` decides whether an assignment is legal; the number of processes is the only
limit of our own.
"""

import functools

from megatron_ring.config import Config
from tests.training import tiny
from tests.training.covering import Assignment, Factors, covering
from tests.training.matrix import Matrix

FACTORS: Factors = {
    "pipe": (1, 2, 4),
    "data": (1, 2),
    "ring": (1, 2, 3, 4),
    "ulysses": (1, 2, 4),
    "tensor": (1, 2, 4),
    "layout": ("none", "ring", "striped", "striped by 3", "zigzag"),
    "sequence_parallel": (False, True),
    "zero": (0, 1, 2, 3),
    "offload": ("none", "optimizer", "optimizer and parameters"),
    "micro_batches": (1, 3),
    "recompute": ("none", "selective", "full", "full with attention"),
    "mlp_chunks": (1, 3),
    "loss_chunk": (0, 20),
    "kernel": ("sdpa", "reference"),
    "documents": ("ignored", "masked"),
    "kind": ("Llama", "Qwen 2", "GPT-2"),
    "tied": (True, False),
    "key_value_heads": (8, 4, 2),
    "head_size": (8, 16),
    "qk_layernorm": (False, True),
    "window": (0, 7),
    "softmax": ("vanilla", "off-by-one", "learnable"),
}

MATHEMATICS = (
    "documents",
    "kind",
    "tied",
    "key_value_heads",
    "head_size",
    "qk_layernorm",
    "window",
    "softmax",
)

# Divisible by the numbers of shards, stripes, chunks and tensor ranks of every grid.
SEQ = 72
GLOBAL_BATCH = 6

_KINDS = {
    "Llama": {"num_layers": 4},
    "Qwen 2": {"num_layers": 4, "add_qkv_bias": True},
    # Five layers: two or four stages hold unequally many.
    "GPT-2": {
        "num_layers": 5,
        "normalization": "LayerNorm",
        "activation": "gelu",
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
}


def legal(row: Assignment) -> bool:
    """Whether ``row`` can run on up to eight processes."""
    return MATRIX.is_legal(row, 8)


def legal_on_four(row: Assignment) -> bool:
    return MATRIX.is_legal(row, 4)


@functools.cache
def each_value() -> list[Assignment]:
    """Return a few rows, on up to four processes, in which every value occurs."""
    return covering(FACTORS, legal_on_four, strength=1)


@functools.cache
def each_pair() -> list[Assignment]:
    """Return rows in which every legal pair of values occurs."""
    return covering(FACTORS, legal, strength=2)


def config(row: Assignment) -> Config:
    return tiny.config(
        model=_model(row),
        parallel=parallel(row),
        data=data(row, SEQ),
        training=_training(row),
        memory=_memory(row),
    )


def _model(row: Assignment) -> dict:
    return _KINDS[row["kind"]] | {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": row["key_value_heads"],
        "kv_channels": row["head_size"],
        "qk_layernorm": row["qk_layernorm"],
        "untie_embeddings_and_output_weights": not row["tied"],
        "window_size": row["window"],
        "window_attn_skip_freq": 2 if row["window"] else 0,
        "softmax_type": row["softmax"],
    }


def parallel(row: Assignment) -> dict:
    """Return the options of the processes, for the GPU tests too."""
    name, _, stripe_size = row["layout"].partition(" by ")
    return {
        "context_parallel": name,
        "context_parallel_size": row["ring"] * row["ulysses"],
        "ulysses_degree": row["ulysses"],
        "stripe_size": int(stripe_size or 1),
        "attention_kernel": row["kernel"],
        "tensor_model_parallel_size": row["tensor"],
        "sequence_parallel": row["sequence_parallel"],
        "pipeline_model_parallel_size": row["pipe"],
    }


def data(row: Assignment, seq_length: int) -> dict:
    """Return the options of the samples, for the GPU tests too."""
    are_masked = row["documents"] == "masked"
    packing = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    return {"seq_length": seq_length, **dict.fromkeys(packing, are_masked)}


def _training(row: Assignment) -> dict:
    return {
        "zero_stage": row["zero"],
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": GLOBAL_BATCH // (row["data"] * row["micro_batches"]),
        # Adam divides by the root of the squared gradient. With 1e-8, entries whose gradient is
        # only rounding error would take full steps; with 1e-3, which is large for a gradient, steps
        # are nearly proportional to gradients.
        "adam_eps": 1e-3,
    }


def _memory(row: Assignment) -> dict:
    return {
        "recompute": row["recompute"].split()[0],
        "recompute_attention": row["recompute"] == "full with attention",
        "mlp_chunks": row["mlp_chunks"],
        "loss_chunk_size": row["loss_chunk"],
        "offload_optimizer": "none" if row["offload"] == "none" else "cpu",
        "offload_param": "cpu" if row["offload"].endswith("parameters") else "none",
    }


MATRIX = Matrix(FACTORS, MATHEMATICS, config)
