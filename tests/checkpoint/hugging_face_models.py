"""Tiny transformers models with random weights, in every family and variant, and ours of them."""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file

from megatron_ring.checkpoint.summary import Summary
from megatron_ring.model.gpt import GPT
from tests.model.conftest import plain_attention

# Provenance, and a key that layer_types makes redundant.
NOT_COMPARED = {"transformers_version", "_name_or_path", "max_window_layers"}

# As in tests/training/tiny.py, so that its runs can train these models.
VOCABULARY = 61
LENGTH = 48

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
_GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": LENGTH,
}
_GPT2_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


class Case(NamedTuple):
    """A family, and the keys of its config besides the sizes."""

    family: str
    options: dict


CASES = {
    "llama": Case("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama tied": Case("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama with biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama by linear": Case(
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    ),
    "llama 3": Case(
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, **_LLAMA3}},
    ),
    "llama by yarn": Case(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 12,
            }
        },
    ),
    "mistral": Case("mistral", {"sliding_window": 5}),
    "mistral without a window": Case("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": Case("qwen2", {}),
    "qwen2 with a window": Case(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Case("qwen3", {"head_dim": 16}),
    "qwen3 with full layers between": Case(
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt2": Case("gpt2", {"n_inner": 48}),
    "gpt2 untied": Case("gpt2", {"tie_word_embeddings": False}),
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
}


def build(case: Case) -> transformers.PreTrainedModel:
    """Build a model in float32.

    All parameters are random, including norms and biases, so that a test notices one that is
    swapped or left out.
    """
    config_class, model_class = _CLASSES[case.family]
    sizes = _GPT2_SIZES | _GPT2_IDS | _NO_DROPOUT if case.family == "gpt2" else _SIZES
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | case.options)).eval()
    for name, parameter in model.named_parameters():
        is_norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
    return model


def save(case: Case, folder: Path) -> Path:
    """Save a model with save_pretrained in several files; returns ``folder``."""
    build(case).save_pretrained(folder, max_shard_size="20KB")
    return folder


@torch.no_grad()
def logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return logits_BSV in float32, as transformers computes them from a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    return model.eval()(tokens_BS).logits


def our_model(checkpoint: Summary) -> GPT:
    """Build our model on one process with all parameters from the checkpoint."""
    state = checkpoint.state
    model = GPT(
        checkpoint.config.model, state.vocab_size, state.seq_length, plain_attention, seed=1
    )
    parameters = dict(model.named_parameters())
    assert parameters.keys() == checkpoint.tensors.shapes.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.tensors.read(name))
    return model


@torch.no_grad()
def our_logits(checkpoint: Summary, tokens_BS: torch.Tensor) -> torch.Tensor:
    return our_model(checkpoint)(tokens_BS, torch.arange(tokens_BS.shape[1]))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors in the folder's safetensors files."""
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def config(folder: Path) -> dict:
    read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    if read["model_type"] == "gpt2":
        read["n_inner"] = read["n_inner"] or 4 * read["n_embd"]
    without = NOT_COMPARED | ({"head_dim"} if read["model_type"] == "qwen2" else set())
    return {key: value for key, value in read.items() if key not in without}
