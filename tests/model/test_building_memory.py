"""Building a model needs the host memory that a rank keeps, and at most 256 MiB."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.config import ModelConfig, load_yaml
from megatron_ring.model.initialization import BLOCK_ELEMENTS
from megatron_ring.model.shapes import element_count, parameter_shapes
from megatron_ring.plan.memory_report import ASSUMED_VOCAB_SIZE

RECIPES = Path(__file__).parents[2] / "configs"
ALLOWED = 256 << 20
TENSOR_RANKS = 8
VOCABULARY, SEQ_LENGTH = 65_536, 1024
# 205 million parameters, most of them in two matrices of 268 MB of float32.
MODEL = {
    "num_layers": 5,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "ffn_hidden_size": 3584,
    "untie_embeddings_and_output_weights": True,
}

# Builds the model on one of eight tensor ranks, whole or as one of eight ZeRO 3 partitions, and
# prints the bytes that it keeps and the bytes by which the peak of the process grew.
_BUILD = """
import json, sys
import torch
from megatron_ring.config import ModelConfig
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import build
from megatron_ring.parallel.tensor_exchange import TensorParallel

model, vocabulary, seq_length, rank, ranks, partitions = json.loads(sys.argv[1])

def high_water() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

kept = []

def partition(parameter):
    size = -(-parameter.numel() // partitions)
    kept.append(torch.zeros(size))
    return kept[-1], 3 * size

tensor = TensorParallel(rank=rank, size=ranks)
def built(config, vocabulary):
    return build(
        GPT, config, vocabulary, seq_length, None, seed=1, tensor=tensor,
        partition=partition if partitions > 1 else None,
    )

built(ModelConfig(num_layers=1, hidden_size=16), 16)  # what the first call imports
kept.clear()
before = high_water()
gpt = built(ModelConfig(**model), vocabulary)
parameters = kept if partitions > 1 else list(gpt.parameters())
print(json.dumps([sum(p.nbytes for p in parameters), high_water() - before]))
"""


def built_in_a_fresh_process(rank: int, ranks: int, partitions: int) -> tuple[int, int]:
    """Return the bytes that a rank keeps of the model, and its peak above an idle process."""
    arguments = json.dumps([MODEL, VOCABULARY, SEQ_LENGTH, rank, ranks, partitions])
    printed = subprocess.run(
        [sys.executable, "-c", _BUILD, arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    kept, peak = json.loads(printed.splitlines()[-1])
    return kept, peak


@pytest.mark.whole
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of /proc/self/status")
@pytest.mark.parametrize(
    ("rank", "ranks", "partitions"),
    [
        pytest.param(0, TENSOR_RANKS, 1, marks=pytest.mark.exhaustive),
        (TENSOR_RANKS - 1, TENSOR_RANKS, 1),
        (0, 1, 1),
        (0, 1, 8),
    ],
    ids=["first tensor rank", "last tensor rank", "one rank", "a ZeRO 3 partition"],
)
def test_the_peak_is_what_a_rank_keeps_and_at_most_256_mib(rank, ranks, partitions):
    count = element_count(parameter_shapes(ModelConfig(**MODEL), VOCABULARY, SEQ_LENGTH))
    assert 200e6 < count < 210e6
    kept, peak = built_in_a_fresh_process(rank, ranks, partitions)
    assert kept == pytest.approx(4 * count / ranks / partitions, rel=0.01)
    assert peak <= kept + ALLOWED


def test_building_the_7b_recipe_takes_blocks_of_host_memory_and_no_more():
    """On CUDA parameters are on the GPU. Held at once: a block, its part, and the part in bf16."""
    recipe = load_yaml(RECIPES / "llama-7b-256k.yaml")
    shapes = parameter_shapes(recipe.model, ASSUMED_VOCAB_SIZE, recipe.data.seq_length)
    float32_bytes = 4 * element_count(shapes)
    assert 28e9 < float32_bytes < 30e9  # what each rank held before parameters were built in place
    widest_row = max(math.prod(shape[1:]) for shape in shapes.values())
    assert 16 * widest_row <= BLOCK_ELEMENTS  # the limit of a block is elements then, not rows
    largest_block_bytes = 4 * (BLOCK_ELEMENTS + 15 * widest_row)
    assert 2.5 * largest_block_bytes <= ALLOWED / 5
