"""Tiny models for inference, on each rank, and their logits by a full forward on one process."""

import functools
from dataclasses import replace

import torch

from megatron_ring.config import ModelConfig
from megatron_ring.inference.model import InferenceModel
from megatron_ring.model import initialization
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor import split_of, whole_shape
from megatron_ring.parallel.tensor_exchange import ALONE, TensorParallel
from tests.model.conftest import CONFIGS, plain_attention

VOCABULARY = 49  # does not divide by the tensor ranks
LENGTH = 96

# A spread of the weights at which attention is not close to uniform.
_SPREAD = {"init_method_std": 0.3}

MODELS: dict[str, ModelConfig] = {
    name: replace(config, **_SPREAD)
    for name, config in {
        **CONFIGS,
        "yarn": replace(
            CONFIGS["llama"],
            rope_scaling="yarn",
            rope_scaling_factor=4.0,
            rope_original_length=24,
            window_size=7,
        ),
        "off-by-one": replace(CONFIGS["gpt2"], softmax_type="off-by-one", window_size=1),
    }.items()
}


def build(name: str, tensor: TensorParallel = ALONE) -> GPT:
    """Build a model in float32; sinks and biases, which begin as zeros, are random too."""
    model = initialization.build(
        GPT, MODELS[name], VOCABULARY, LENGTH, plain_attention, tensor, seed=1
    ).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith((".bias", ".sink_H")):
                _fill(parameter, parameter_name, tensor)
    return model.requires_grad_(False)


def _fill(parameter: torch.Tensor, name: str, tensor: TensorParallel) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    whole = torch.randn(whole_shape(parameter), generator=generator)
    split = split_of(parameter)
    parameter.copy_(whole if split is None else whole[split.indices.start : split.indices.stop])


def inference_model(name: str, groups: ProcessGroups, **options: object) -> InferenceModel:
    model = build(name, TensorParallel.of(groups.tensor, False))
    return InferenceModel(model, groups, **{"kernel": "sdpa", **options})


@functools.cache
def whole_model(name: str) -> GPT:
    return build(name)


@functools.cache
def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (tokens,), generator=generator).tolist())


@torch.no_grad()
def full_logits(name: str, tokens: list[int]) -> torch.Tensor:
    """Return logits_SV of a full forward on one process."""
    model = whole_model(name)
    return model(torch.tensor([tokens]), torch.arange(len(tokens)))[0]
