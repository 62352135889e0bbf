"""Whether a run can resume from a checkpoint: the same model and data, on any grid of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from megatron_ring.checkpoint.store import Stored, read_config
from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError, counted, flag

# Options that change what a model computes but not the names and shapes of its tensors.
_WITHOUT_TENSORS = {
    "norm_epsilon",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "rope_original_length",
    "init_method_std",
    "window_size",
    "window_attn_skip_freq",
    "attention_dropout",
    "attn_logit_softcapping",
}


def check_same_model(
    stored: Stored, config: Config, vocab_size: int, weights_only: bool = False
) -> None:
    """Raise CheckpointError, naming every differing option, if the checkpoint is of another model.

    With ``weights_only`` only the tensors have to agree, which is what a new run that starts from
    the weights needs.
    """
    ignored = {"padded_vocab_size"} | (_WITHOUT_TENSORS if weights_only else set())
    now = config.model
    then = read_config(stored.path).model
    seq_length_then = stored.state.seq_length
    seq_length_now = config.data.seq_length
    problems = [
        f"{name} {there} there, {here} here. Set {flag(name)}."
        for name, there, here in _model_differences(then, seq_length_then, now, seq_length_now)
        if name not in ignored
    ]
    if stored.state.vocab_size != vocab_size:
        problems.append(
            f"vocab_size {stored.state.vocab_size} there, {vocab_size} here. "
            "Set --tokenizer-model or --padded-vocab-size."
        )
    learned_positions = now.position_embedding_type == "learned_absolute"
    if learned_positions and seq_length_then != seq_length_now:
        problems.append(
            f"seq_length {seq_length_then} there, {seq_length_now} here. Set --seq-length."
        )
    if problems:
        title = (
            f"{stored.path} is a checkpoint of another model. Its own options: --config "
            f"{stored.path}/config.yaml. The differences:"
        )
        raise CheckpointError([title, *problems])


def check_same_data(stored: Stored, here: Sequence[dict[str, Any]]) -> None:
    """Raise CheckpointError if this run would read other tokens than the checkpoint's run.

    The error names each token store that differs. ``here``: see ``changed_token_stores``.
    """
    if changed := changed_token_stores(stored, here):
        raise CheckpointError(
            [
                f"{stored.path} was trained on other data than --data-path names, so sample "
                f"{stored.state.consumed_samples:,}, from which it would resume, is different "
                "text. Restore the data, set --data-path to it, or resume on the new data with "
                "--allow-other-data:",
                *changed,
            ]
        )


def changed_token_stores(stored: Stored, here: Sequence[dict[str, Any]]) -> list[str]:
    """Describe each token store that only one of the checkpoint's run and this run reads.

    ``here``: the fingerprints (data/store_fingerprint.py) of the stores that this run reads. The
    order and weights of a blend do not matter, nor does a store's path. A checkpoint written before
    fingerprints were kept matches any data.
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
    return [_describe_change(name, there, added) for name in names]


def _same_tokens(one: dict[str, Any], other: dict[str, Any]) -> bool:
    manifests = one.get("manifest_sha256"), other.get("manifest_sha256")
    if all(manifests) and len(set(manifests)) != 1:
        return False
    return all(one.get(key) == other.get(key) for key in ("documents", "tokens", "sampled_sha256"))


def _describe_change(name: str, there: list[dict[str, Any]], here: list[dict[str, Any]]) -> str:
    """Describe how the store ``name``, which is in one of the lists or in both, differs."""
    before = _size(name, there)
    now = _size(name, here)
    content = " of other content" if before == now else ""
    return f"token store {name}: {before} there, {now}{content} here."


def _size(name: str, stores: list[dict[str, Any]]) -> str:
    for store in stores:
        if store.get("prefix") == name:
            tokens, documents = (store.get(unit) for unit in ("tokens", "documents"))
            return f"{counted(tokens, 'token')} in {counted(documents, 'document')}"
    return "not read"


def changed_data_options(stored: Stored, config: Config) -> list[str]:
    """Describe the differing options that change which text a sample number refers to."""
    then = read_config(stored.path)
    data_then = replace(then.data, split=then.data.shares)
    data_now = replace(config.data, split=config.data.shares)
    differences = [
        *_differences(data_then, data_now),
        ("seed", then.training.seed, config.training.seed),
    ]
    return [
        f"{name} {there} there, {here} here" for name, there, here in differences if there != here
    ]


def _model_differences(
    then: ModelConfig, seq_length_then: int, now: ModelConfig, seq_length_now: int
) -> Iterator[tuple[str, Any, Any]]:
    """Yield ``_differences`` of two models; a default equals the same value given explicitly.

    The default of rope_original_length follows from seq_length.
    """
    equivalent = set()
    if _windows(then) == _windows(now):
        equivalent |= {"window_size", "window_attn_skip_freq"}
    if then.position_embedding_type == now.position_embedding_type == "learned_absolute":
        equivalent |= {"rotary_base"}
    if then.rope_scaling != now.rope_scaling:
        equivalent |= {"rope_original_length"}  # its default follows from rope_scaling
    resolved_then = _resolved(then, seq_length_then)
    resolved_now = _resolved(now, seq_length_now)
    for name, there, here in _differences(resolved_then, resolved_now):
        # A default derived from other sizes is not reported: those sizes are the difference. The
        # default of rope_original_length is, because it follows from seq_length too.
        derived = getattr(then, name) == getattr(now, name) and name != "rope_original_length"
        if name not in equivalent and not derived:
            yield name, there, here


def _windows(model: ModelConfig) -> list[int]:
    return [model.window_of(layer) for layer in range(model.num_layers)]


def _resolved(model: ModelConfig, seq_length: int) -> ModelConfig:
    """Return the same model with every 0 that stands for a default replaced by its value."""
    original_length = model.rope_original_length
    if model.rope_scaling in ("yarn", "llama3"):
        original_length = original_length or seq_length / model.rope_scaling_factor
    return replace(
        model,
        num_query_groups=model.key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.feed_forward_size,
        rope_original_length=original_length,
    )


def _differences(then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, there, here) for each field of a config section that differs."""
    for field in fields(now):
        there = getattr(then, field.name)
        here = getattr(now, field.name)
        if there != here:
            yield field.name, there, here
