"""Context extension on import: the sequence length of the imported model and its RoPE scaling."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ring.checkpoint.hugging_face.key_mappings import Fields, invalid_sizes
from megatron_ring.checkpoint.hugging_face.rope_parameters import LONGEST, original_length
from megatron_ring.config import ModelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.untrusted import shown


@dataclass(frozen=True)
class Stretch:
    """Options for the context length of an imported model."""

    rope_scaling: Literal["unchanged", "linear", "ntk", "yarn", "llama3"] = "unchanged"
    """RoPE scaling, as --rope-scaling of pretrain_gpt.py, from the model's original length."""
    rope_scaling_factor: float = 0.0
    """New length over original length. 0: --seq-length over the length in config.json."""
    seq_length: int = 0
    """Tokens of a sample in the written config. 0: the longest sequence that the model supports."""


def stretched(
    model: ModelConfig, config: Fields, longest: int, stretch: Stretch
) -> tuple[ModelConfig, int]:
    """Return the model with its RoPE scaled by ``stretch``, and its seq_length.

    ``longest`` is the longest sequence according to ``config``, the model's config.json. Raises
    ConfigError.
    """
    # The config.json of some scaled models still names the original length as the longest.
    limit = max(longest, int(model.rope_original_length * model.rope_scaling_factor))
    if problem := _problem(model, limit, stretch):
        raise ConfigError(problem)
    scaling = stretch.rope_scaling
    if scaling == "unchanged":
        return model, stretch.seq_length or longest
    original = original_length(config)
    key = "original_max_position_embeddings"
    if problems := invalid_sizes({key: original}, key):
        raise ConfigError(
            f"rope_scaling {scaling} needs the original length of the model. {problems[0]}"
        )
    factor = stretch.rope_scaling_factor or stretch.seq_length / original
    if factor <= 1:
        raise ConfigError(
            f"rope_scaling {scaling} by {factor:g}, from {original} tokens, must be by more than "
            f"1. Set --seq-length to more than {original}, or --rope-scaling-factor."
        )
    if not factor <= LONGEST / original:
        raise ConfigError(
            f"rope_scaling {scaling} by {factor:g}, from {original} tokens, makes a sequence "
            f"longer than {LONGEST} tokens. Set --rope-scaling-factor to at most "
            f"{LONGEST / original:g}, or --seq-length."
        )
    # Stored as a number, so that it does not change if a run sets another seq_length.
    rope_original_length = original if scaling in ("yarn", "llama3") else 0
    model = replace(
        model,
        rope_scaling=scaling,
        rope_scaling_factor=factor,
        rope_original_length=rope_original_length,
    )
    return model, stretch.seq_length or int(original * factor)


def _problem(model: ModelConfig, longest: int, stretch: Stretch) -> str:
    """Return why the options are invalid for ``model``, "" if they are valid."""
    scales = stretch.rope_scaling != "unchanged"
    seq_length = stretch.seq_length
    factor = stretch.rope_scaling_factor
    if seq_length < 0 or factor < 0:
        return (
            "seq_length and rope_scaling_factor must not be below 0. "
            "Set --seq-length, --rope-scaling-factor."
        )
    if seq_length > LONGEST:
        return f"seq_length {shown(seq_length)} must be at most {LONGEST}. Set --seq-length."
    learned_positions = model.position_embedding_type == "learned_absolute"
    if learned_positions and (scales or seq_length not in (0, longest)):
        return (
            f"the model's positions are a learned table of {longest} rows, which --rope-scaling "
            f"cannot extend: its seq_length is {longest}. Leave out --seq-length and "
            "--rope-scaling."
        )
    if scales and model.rope_scaling == "linear":
        return (
            "the model's RoPE already has linear scaling, and config.json does not have the "
            "original length. Leave out --rope-scaling."
        )
    if scales and not (seq_length or factor):
        return (
            f"rope_scaling {stretch.rope_scaling} needs a length. "
            "Set --seq-length, or --rope-scaling-factor."
        )
    if factor and not scales:
        return (
            "rope_scaling_factor has no effect without rope_scaling. "
            "Set --rope-scaling, or leave it out."
        )
    if seq_length > longest and not scales:
        return (
            f"seq_length {seq_length} is longer than the {longest} tokens that the model supports. "
            f"Set --rope-scaling (yarn, for example), or --seq-length to at most {longest}."
        )
    return ""
