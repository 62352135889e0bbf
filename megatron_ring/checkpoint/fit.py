"""Whether a checkpoint is of the run that would resume from it: the same model, over whatever processes."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from megatron_ring.checkpoint.store import Stored, read_config
from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError, flag

# What makes a model compute otherwise with the same tensors.
_WITHOUT_TENSORS = {
    "norm_epsilon", "rotary_base", "rope_scaling", "rope_scaling_factor", "rope_original_length", "init_method_std",
    "window_size", "window_attn_skip_freq", "attention_dropout", "attn_logit_softcapping",
}  # fmt: skip


def check_same_model(
    stored: Stored, config: Config, vocab_size: int, tensors_alone: bool = False
) -> None:
    """Raise CheckpointError, naming every option that differs, when the checkpoint is of another model.

    ``tensors_alone``: of one that has other tensors, which is all that matters to a new run from its weights.
    """
    ignored = {"padded_vocab_size"} | (_WITHOUT_TENSORS if tensors_alone else set())
    now = config.model
    then = read_config(stored.path).model
    differing = [
        f"{name} {there} there, {here} here. Set {flag(name)}."
        for name, there, here in _model_differences(
            then, stored.state.seq_length, now, config.data.seq_length
        )
        if name not in ignored
    ]
    if stored.state.vocab_size != vocab_size:
        differing.append(
            f"vocab_size {stored.state.vocab_size} there, {vocab_size} here. Set --tokenizer-model or "
            "--padded-vocab-size."
        )
    if (
        now.position_embedding_type == "learned_absolute"
        and stored.state.seq_length != config.data.seq_length
    ):
        differing.append(
            f"seq_length {stored.state.seq_length} there, {config.data.seq_length} here. Set --seq-length."
        )
    if differing:
        raise CheckpointError([f"{stored.path} is a checkpoint of another model:", *differing])


def check_same_data(stored: Stored, here: Sequence[dict[str, Any]]) -> None:
    """Raise CheckpointError, naming each token store, when the run would read other tokens than the checkpoint's run.

    ``here``: see changed_stores.
    """
    if changed := changed_stores(stored, here):
        raise CheckpointError(
            [
                f"{stored.path} was trained on other data than --data-path names, so sample "
                f"{stored.state.consumed_samples:,}, where it goes on, is of another text. Restore the data, set "
                "--data-path to it, or go on all the same with --allow-other-data:",
                *changed,
            ]
        )


def changed_stores(stored: Stored, here: Sequence[dict[str, Any]]) -> list[str]:
    """State each token store that only one of the checkpoint's run and this run reads, with its counts.

    ``here``: the fingerprints (data/fingerprint.py) of the stores that the run reads. Neither the order nor the weights
    of a blend matter, nor a store's path. Nothing is known of a checkpoint from before fingerprints were kept.
    """
    there = list(stored.state.data)
    if not there:
        return []
    added = []
    for store in here:
        same = next((other for other in there if _same_tokens(other, store)), None)
        if same is None:
            added.append(store)
        else:
            there.remove(same)
    names = dict.fromkeys(store.get("prefix", "") for store in [*there, *added])
    return [_changed_store(name, there, added) for name in names]


def _same_tokens(one: dict[str, Any], other: dict[str, Any]) -> bool:
    manifests = one.get("manifest_sha256"), other.get("manifest_sha256")
    return (not all(manifests) or len(set(manifests)) == 1) and all(
        one.get(key) == other.get(key) for key in ("documents", "tokens", "sampled_sha256")
    )


def _changed_store(name: str, there: list[dict[str, Any]], here: list[dict[str, Any]]) -> str:
    """State how the store ``name``, of one of the lists or of both, differs."""
    before, now = _size(name, there), _size(name, here)
    content = " of other content" if before == now else ""
    return f"token store {name}: {before} there, {now}{content} here."


def _size(name: str, stores: list[dict[str, Any]]) -> str:
    found = next((store for store in stores if store.get("prefix") == name), None)
    return (
        f"{found.get('tokens')} tokens in {found.get('documents')} documents"
        if found
        else "not read"
    )


def other_data(stored: Stored, config: Config) -> list[str]:
    """What has the run read other samples under the same numbers than the checkpoint's, in words."""
    then = read_config(stored.path)
    data = (replace(section, split=section.shares) for section in (then.data, config.data))
    found = [*_differences(*data), ("seed", then.training.seed, config.training.seed)]
    return [f"{name} {there} there, {here} here" for name, there, here in found if there != here]


def _model_differences(
    then: ModelConfig, then_length: int, now: ModelConfig, now_length: int
) -> Iterator[tuple[str, Any, Any]]:
    """``_differences`` of what two models are: a default and the same value spelled out are one model.

    The lengths are seq_length, from which the default of rope_original_length follows.
    """
    same = set()
    if _windows(then) == _windows(now):
        same |= {"window_size", "window_attn_skip_freq"}
    if then.position_embedding_type == now.position_embedding_type == "learned_absolute":
        same |= {"rotary_base"}
    if then.rope_scaling != now.rope_scaling:
        same |= {"rope_original_length"}  # what its default is follows from that
    for name, there, here in _differences(_resolved(then, then_length), _resolved(now, now_length)):
        # A default that follows from other sizes: those are the difference. This one follows from seq_length too.
        derived = getattr(then, name) == getattr(now, name) and name != "rope_original_length"
        if name not in same and not derived:
            yield name, there, here


def _windows(model: ModelConfig) -> list[int]:
    return [model.window_of(layer) for layer in range(model.num_layers)]


def _resolved(model: ModelConfig, seq_length: int) -> ModelConfig:
    """The same model with every size in the place of the 0 that stands for it."""
    original = model.rope_original_length
    if model.rope_scaling in ("yarn", "llama3"):
        original = original or seq_length / model.rope_scaling_factor
    return replace(
        model,
        num_query_groups=model.key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.feed_forward_size,
        rope_original_length=original,
    )


def _differences(then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, there, here) of each field of a section that differs."""
    for f in fields(now):
        if getattr(then, f.name) != getattr(now, f.name):
            yield f.name, getattr(then, f.name), getattr(now, f.name)
