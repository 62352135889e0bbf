"""Whether a checkpoint is of the run that would resume from it: the same model, over whatever processes."""

from dataclasses import fields

from megatron_ring.checkpoint.store import CONFIG, Stored
from megatron_ring.config import Config, ModelConfig, load_yaml
from megatron_ring.errors import CheckpointError, flag


def check_same_model(stored: Stored, config: Config, vocab_size: int) -> None:
    """Raise CheckpointError, naming every size that differs, when the checkpoint is of another model."""
    then, now = load_yaml(stored.path / CONFIG).model, config.model
    differing = [
        f"{f.name} {getattr(then, f.name)} there, {getattr(now, f.name)} here. Set {flag(f.name)}."
        for f in fields(ModelConfig)
        if getattr(then, f.name) != getattr(now, f.name)
    ]
    if stored.state.vocab_size != vocab_size:
        differing.append(f"vocab_size {stored.state.vocab_size} there, {vocab_size} here. Set --tokenizer-model.")
    if now.position_embedding_type == "learned_absolute" and stored.state.seq_length != config.data.seq_length:
        differing.append(
            f"seq_length {stored.state.seq_length} there, {config.data.seq_length} here. Set --seq-length."
        )
    if differing:
        raise CheckpointError([f"{stored.path} is a checkpoint of another model:", *differing])
