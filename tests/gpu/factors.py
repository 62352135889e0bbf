"""The factors of the GPU tests: what tests/training/factors.py has, and what only a GPU has.

Those are vendors' kernels, Triton's, fused operations, fp16 and activation offload. On a CPU their
values are illegal, and the rows are without them.
"""

from megatron_ring.config import Config
from tests.training import tiny
from tests.training.covering import Assignment, Factors, covering
from tests.training.factors import data, parallel
from tests.training.matrix import Matrix
from tests.training.trained import Tolerance

FACTORS: Factors = {
    "pipe": (1, 2),
    "data": (1, 2),
    "ring": (1, 2, 3, 4),
    "ulysses": (1, 2),
    "tensor": (1, 2),
    "layout": ("none", "ring", "striped", "striped by 16", "zigzag"),
    "sequence_parallel": (False, True),
    "zero": (0, 1, 2, 3),
    "offload": ("none", "activations", "optimizer", "optimizer and parameters"),
    "micro_batches": (1, 2),
    "recompute": ("none", "selective", "full", "full with attention"),
    "kernel": ("sdpa", "cudnn", "triton", "flash", "reference"),
    "operations": ("torch", "triton", "liger"),
    "dtype": ("fp32", "bf16", "fp16"),
    "documents": ("ignored", "masked"),
    "kind": ("Llama", "GPT-2"),
    "key_value_heads": (4, 2),
    "head_size": (64, 128),
    "window": (0, 100),
    "softmax": ("vanilla", "learnable"),
}

MATHEMATICS = (
    "dtype",
    "documents",
    "kind",
    "key_value_heads",
    "head_size",
    "window",
    "softmax",
)

TOLERANCE = {
    "fp32": Tolerance(2e-5, 2e-5, 2e-5),
    "fp16": Tolerance(1e-3, 5e-3, 0.1),
    "bf16": Tolerance(2e-3, 2e-2, 0.25),
}
"""Two ranks on an H100 had relative differences of losses and norms of at most 6e-7, 8e-5 and
3.6e-4. Rows of the matrix also have other kernels than the process they are compared with. After
four steps, parameters in half precision differ by rounding errors of their small gradients; one
that misses its gradient is off by 1, and one that misses half of it by 0.5."""

# Divisible by the shards, stripes and halves of every grid, and longer than a kernel's tile of 128.
SEQ = 384
GLOBAL_BATCH = 4
STEPS = 4

_KINDS = {
    "Llama": {},
    "GPT-2": {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
}


def rows(device: str) -> list[Assignment]:
    """Return rows on up to four processes in which every legal pair of values occurs.

    On a CPU: on up to two processes, with every value.
    """
    processes, strength = (4, 2) if device == "cuda" else (2, 1)
    return covering(FACTORS, lambda row: MATRIX.is_legal(row, processes), strength)


def tolerance(row: Assignment) -> Tolerance:
    return TOLERANCE[row["dtype"]]


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
        "num_layers": 3,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": row["key_value_heads"],
        "kv_channels": row["head_size"],
        "window_size": row["window"],
        "softmax_type": row["softmax"],
    }


def _training(row: Assignment) -> dict:
    # DeepSpeed's first loss scale of 65,536 would overflow in the first steps, which it then skips.
    loss_scale = {"deepspeed": {"fp16": {"initial_scale_power": 8}}}
    return {
        "zero_stage": row["zero"],
        "dtype": row["dtype"],
        "fused_operations": row["operations"],
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": GLOBAL_BATCH // (row["data"] * row["micro_batches"]),
        "adam_eps": 1e-3,  # see tests/training/factors.py
        **(loss_scale if row["dtype"] == "fp16" else {}),
    }


def _memory(row: Assignment) -> dict:
    return {
        "recompute": row["recompute"].split()[0],
        "recompute_attention": row["recompute"] == "full with attention",
        "offload_activations": row["offload"] == "activations",
        "offload_optimizer": "cpu" if row["offload"].startswith("optimizer") else "none",
        "offload_param": "cpu" if row["offload"].endswith("parameters") else "none",
    }


MATRIX = Matrix(FACTORS, MATHEMATICS, config)
