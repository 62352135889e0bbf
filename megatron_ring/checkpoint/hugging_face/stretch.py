"""Long context on import: how long the imported model's samples are, and how its RoPE is stretched to them."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ring.checkpoint.hugging_face.key_mappings import Fields, missing_sizes
from megatron_ring.checkpoint.hugging_face.rope_parameters import LONGEST, original_length
from megatron_ring.config import ModelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.untrusted import shown


@dataclass(frozen=True)
class Stretch:
    rope_scaling: Literal["unchanged", "linear", "ntk", "yarn", "llama3"] = "unchanged"
    """Stretch RoPE, as --rope-scaling of pretrain_gpt.py, from the length that the model was first trained on."""
    rope_scaling_factor: float = 0.0
    """New length over old one. 0: --seq-length over the length that config.json tells."""
    seq_length: int = 0
    """Tokens of a sample in the config that is written. 0: the longest that the model is made for."""


def stretched(
    model: ModelConfig, config: Fields, longest: int, asked: Stretch
) -> tuple[ModelConfig, int]:
    """The model as ``asked`` for, and its seq_length; ``longest`` is what ``config``, a config.json, is made for.

    Raises ConfigError.
    """
    # Some that are stretched say how far, and name the old length still.
    limit = max(longest, int(model.rope_original_length * model.rope_scaling_factor))
    if problem := _problem(model, limit, asked):
        raise ConfigError(problem)
    if asked.rope_scaling == "unchanged":
        return model, asked.seq_length or longest
    original = original_length(config)
    if problems := missing_sizes(
        {"original_max_position_embeddings": original}, "original_max_position_embeddings"
    ):
        raise ConfigError(
            [f"rope_scaling {asked.rope_scaling} has no length to begin from. {problems[0]}"]
        )
    factor = asked.rope_scaling_factor or asked.seq_length / original
    if factor <= 1:
        raise ConfigError(
            f"rope_scaling {asked.rope_scaling} by {factor:g}, from {original} tokens, must be by more than 1. Set "
            f"--seq-length to more than {original}, or --rope-scaling-factor."
        )
    if not factor <= LONGEST / original:
        raise ConfigError(
            f"rope_scaling {asked.rope_scaling} by {factor:g}, from {original} tokens, makes a sequence longer than "
            f"{LONGEST} tokens. Set --rope-scaling-factor to at most {LONGEST / original:g}, or --seq-length."
        )
    # Kept as a number, so that it stays what it is when a run sets another seq_length.
    lengths = original if asked.rope_scaling in ("yarn", "llama3") else 0
    model = replace(
        model,
        rope_scaling=asked.rope_scaling,
        rope_scaling_factor=factor,
        rope_original_length=lengths,
    )
    return model, asked.seq_length or int(original * factor)


def _problem(model: ModelConfig, longest: int, asked: Stretch) -> str:
    stretches = asked.rope_scaling != "unchanged"
    if asked.seq_length < 0 or asked.rope_scaling_factor < 0:
        return "seq_length and rope_scaling_factor must not be below 0. Set --seq-length, --rope-scaling-factor."
    if asked.seq_length > LONGEST:
        return f"seq_length {shown(asked.seq_length)} must be at most {LONGEST}. Set --seq-length."
    if model.position_embedding_type == "learned_absolute" and (
        stretches or asked.seq_length not in (0, longest)
    ):
        return (
            f"the model's positions are a learned table of {longest} rows, which no --rope-scaling stretches: its "
            f"seq_length is {longest}. Leave out --seq-length and --rope-scaling."
        )
    if stretches and model.rope_scaling == "linear":
        return (
            "the model's RoPE is stretched already, linearly, and config.json does not tell from which length. Leave "
            "out --rope-scaling."
        )
    if stretches and not (asked.seq_length or asked.rope_scaling_factor):
        return f"rope_scaling {asked.rope_scaling} to which length? Set --seq-length, or --rope-scaling-factor."
    if asked.rope_scaling_factor and not stretches:
        return "rope_scaling_factor has no effect without a stretch. Set --rope-scaling, or leave it out."
    if asked.seq_length > longest and not stretches:
        return (
            f"seq_length {asked.seq_length} is longer than the {longest} tokens that the model is made for. Set "
            f"--rope-scaling (yarn, for example), or --seq-length to at most {longest}."
        )
    return ""
