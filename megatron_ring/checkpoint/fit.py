"""Whether a checkpoint is of the run that would resume from it: the same model, over whatever processes."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_ring.checkpoint.store import CONFIG, Stored
from megatron_ring.config import Config, load_yaml
from megatron_ring.errors import CheckpointError, flag

# What makes a model compute otherwise with the same tensors.
_WITHOUT_TENSORS = {
    "norm_epsilon", "rotary_base", "rope_scaling", "rope_scaling_factor", "rope_original_length", "init_method_std",
    "window_size", "window_attn_skip_freq", "attention_dropout", "attn_logit_softcapping",
}  # fmt: skip


def check_same_model(stored: Stored, config: Config, vocab_size: int, tensors_alone: bool = False) -> None:
    """Raise CheckpointError, naming every option that differs, when the checkpoint is of another model.

    ``tensors_alone``: of one that has other tensors, which is all that matters to a new run from its weights.
    """
    ignored = {"padded_vocab_size"} | (_WITHOUT_TENSORS if tensors_alone else set())
    now = config.model
    differing = [
        f"{name} {then} there, {here} here. Set {flag(name)}."
        for name, then, here in _differences(load_yaml(stored.path / CONFIG).model, now)
        if name not in ignored
    ]
    if stored.state.vocab_size != vocab_size:
        differing.append(
            f"vocab_size {stored.state.vocab_size} there, {vocab_size} here. Set --tokenizer-model or "
            "--padded-vocab-size."
        )
    if now.position_embedding_type == "learned_absolute" and stored.state.seq_length != config.data.seq_length:
        differing.append(
            f"seq_length {stored.state.seq_length} there, {config.data.seq_length} here. Set --seq-length."
        )
    if differing:
        raise CheckpointError([f"{stored.path} is a checkpoint of another model:", *differing])


def other_data(stored: Stored, config: Config) -> list[str]:
    """What has the run read other samples under the same numbers than the checkpoint's, in words."""
    then = load_yaml(stored.path / CONFIG)
    found = [*_differences(then.data, config.data), ("seed", then.training.seed, config.training.seed)]
    return [f"{name} {there} there, {here} here" for name, there, here in found if there != here]


def _differences(then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, there, here) of each field of a section that differs."""
    for f in fields(now):
        if getattr(then, f.name) != getattr(now, f.name):
            yield f.name, getattr(then, f.name), getattr(now, f.name)
