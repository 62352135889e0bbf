"""Tiny models with random weights as checkpoints of ours, and a tokenizer: for inference."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ring.checkpoint import boxes, names, store, tensors
from megatron_ring.config import Config, DataConfig, InferenceConfig, ModelConfig
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.environment import Environment
from tests.data.text import TEXT

VOCABULARY = 61
LENGTH = 48
NO_STORE = ("no-store/tokens",)
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2)
GPT2 = replace(
    LLAMA,
    num_query_groups=0,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    activation="gelu",
    add_bias_linear=True,
)


TOKENIZER_IDS = 320


@functools.cache
def tokenizer() -> Tokenizer:
    """Return a tokenizer of ``TOKENIZER_IDS`` ids."""
    return train_tokenizer([TEXT], TOKENIZER_IDS)


def write_tokenizer(folder: Path) -> Path:
    """Write ``tokenizer`` to ``folder``, where a token store would be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tokenizer().file_name
    tokenizer().save(path)
    return path


def environment(rank: int, world_size: int) -> Environment:
    """Return the environment of a rank of ``run_ranks``."""
    return Environment(rank, rank, world_size, world_size, threads=1)


def random_model(
    model: ModelConfig = LLAMA, vocab_size: int = VOCABULARY, length: int = LENGTH
) -> GPT:
    """Return a model of which every parameter is random, norms and biases included."""
    gpt = GPT(model, vocab_size, length, None, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return gpt


def write_checkpoint(
    folder: Path,
    gpt: GPT,
    model: ModelConfig = LLAMA,
    step: int = 1,
    data: DataConfig | None = None,
    **state: Any,
) -> Path:
    """Write ``gpt`` as the checkpoint of ``step``, in two files as two ranks would."""
    length = LENGTH if gpt.position_embedding is None else len(gpt.position_embedding.weight)
    length = state.pop("seq_length", length)
    values = {name: parameter.detach() for name, parameter in gpt.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    store.prepare(folder, step)
    partial = folder / names.partial_name(step)
    parts = [
        tensors.write_part(partial, number, list(_halves(values, number))) for number in range(2)
    ]
    tensors.write_index(partial, shapes, [tensors.WEIGHT], parts)
    records = store.flush_and_checksum(folder, step, store.written(folder, step))
    # Without a store at the default path, which `make train` writes.
    config = Config(model=model, data=data or DataConfig(seq_length=length, data_path=NO_STORE))
    vocab_size = len(gpt.embedding.weight)
    run_state = store.RunState(step, 4 * step, vocab_size, length, **state)
    return store.commit(folder, run_state, config, records)


def _halves(values: dict[str, torch.Tensor], number: int) -> Iterator[tensors.Piece]:
    """Yield one half of the elements of each parameter, in boxes, as ZeRO would divide them."""
    for name, whole in values.items():
        middle = whole.numel() // 2
        ends = (0, middle) if number == 0 else (middle, whole.numel())
        for box in boxes.cut(tuple(whole.shape), *ends):
            yield tensors.Piece(name, box, {tensors.WEIGHT: whole[boxes.slices(box)]})


def options(load: Path, **changes: Any) -> InferenceConfig:
    """Return options to load a model in fp32."""
    return InferenceConfig(load=str(load), dtype="fp32", **changes)
