"""Whether a checkpoint is of the run that would resume from it: the same model, split over as many ranks."""

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


def check_same_split(stored: Stored, data_context_size: int, tensor_size: int, pipe_size: int, zero_stage: int) -> None:
    """Raise CheckpointError when the engine's files are split over another number of ranks or another ZeRO stage."""
    state = stored.state
    for axis, then, now in (("tensor", state.tensor_size, tensor_size), ("pipeline", state.pipe_size, pipe_size)):
        if then != now:
            raise CheckpointError(
                f"{stored.path} splits the model over {then} {axis} ranks, this run has {now}. "
                f"Set --{axis}-model-parallel-size {then}."
            )
    if state.zero_stage != zero_stage:
        raise CheckpointError(
            f"{stored.path} was written with zero_stage {state.zero_stage}, this run has {zero_stage}. "
            f"Set --zero-stage {state.zero_stage}."
        )
    if zero_stage and state.data_context_size != data_context_size:
        raise CheckpointError(
            f"{stored.path} splits the optimizer's state over {state.data_context_size} data x context ranks (ZeRO "
            f"{zero_stage}), this run has {data_context_size}. Start {state.data_context_size} times as many processes "
            "as one model takes (tensor x pipeline); how many are context ranks (--context-parallel-size) may change."
        )
