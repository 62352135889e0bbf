"""Only a run of the same model, on the same data, can resume from a checkpoint."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ring.checkpoint import compatibility, store
from megatron_ring.checkpoint.state import decode, encode
from megatron_ring.config import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import state, write


def test_another_model_is_refused_with_every_differing_option(tmp_path):
    write(tmp_path, 5, Config(model=ModelConfig(num_layers=2, hidden_size=128)))
    with pytest.raises(CheckpointError) as refused:
        compatibility.check_same_model(store.newest(tmp_path), Config(), vocab_size=4096)
    title, *problems = refused.value.problems
    assert f"{tmp_path}/step-00000005" in title
    assert f"--config {tmp_path}/step-00000005/config.yaml" in title
    expected = [
        ("num_layers 2 there, 4 here", "--num-layers"),
        ("hidden_size 128 there, 256 here", "--hidden-size"),
        ("vocab_size 61 there, 4096 here", "--tokenizer-model", "--padded-vocab-size"),
    ]
    for problem, parts in zip(problems, expected, strict=True):
        assert all(part in problem for part in parts), problem


GROUPED = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 32}
YARN = {"rope_scaling": "yarn", "rope_scaling_factor": 4.0}


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"num_query_groups": 4}),
        ({"num_query_groups": 4}, {}),
        ({}, {"kv_channels": 64}),
        ({}, {"ffn_hidden_size": 704}),
        ({"activation": "gelu"}, {"activation": "gelu", "ffn_hidden_size": 1024}),
        (GROUPED, GROUPED | {"ffn_hidden_size": 704}),
        (
            {},
            {
                "num_query_groups": 4,
                "kv_channels": 64,
                "ffn_hidden_size": 704,
                "padded_vocab_size": 61,
            },
        ),
        (
            {"window_size": 8},
            {"window_size": 8, "window_attn_skip_freq": 5},
        ),  # 4 layers: none is the fifth
        (YARN, YARN | {"rope_original_length": 12}),
        (
            {"position_embedding_type": "learned_absolute"},
            {"position_embedding_type": "learned_absolute", "rotary_base": 5e5},
        ),
    ],
)
def test_a_default_given_explicitly_is_the_same_model(then, now, tmp_path):
    write(tmp_path, 5, Config(model=ModelConfig(**then)))
    now = Config(model=ModelConfig(**now), data=DataConfig(seq_length=48))
    compatibility.check_same_model(store.newest(tmp_path), now, vocab_size=61)


@pytest.mark.parametrize(
    ("then", "now", "differing"),
    [
        ({}, {"num_query_groups": 2}, ["num_query_groups"]),
        ({}, {"kv_channels": 32}, ["kv_channels"]),
        ({}, {"ffn_hidden_size": 1024}, ["ffn_hidden_size"]),
        ({"activation": "gelu", "ffn_hidden_size": 704}, {}, ["activation"]),
        (
            {"window_size": 8},
            {"window_size": 8, "window_attn_skip_freq": 2},
            ["window_attn_skip_freq"],
        ),
        (YARN, YARN | {"rope_original_length": 24}, ["rope_original_length"]),
        ({}, {"rotary_base": 5e5}, ["rotary_base"]),
        ({}, {"num_attention_heads": 8}, ["num_attention_heads"]),
    ],
)
def test_only_the_option_that_was_changed_is_reported(then, now, differing, tmp_path):
    """Not the defaults that are derived from it."""
    write(tmp_path, 5, Config(model=ModelConfig(**then)))
    now = Config(model=ModelConfig(**now), data=DataConfig(seq_length=48))
    with pytest.raises(CheckpointError) as refused:
        compatibility.check_same_model(store.newest(tmp_path), now, vocab_size=61)
    assert [problem.split()[0] for problem in refused.value.problems[1:]] == differing


def test_a_seq_length_that_changes_the_default_of_rope_original_length_is_refused(tmp_path):
    """The default is seq_length over the scaling factor."""
    yarn = Config(model=ModelConfig(**YARN), data=DataConfig(seq_length=96))
    write(tmp_path, 5, yarn)
    with pytest.raises(CheckpointError, match="--rope-original-length"):
        compatibility.check_same_model(store.newest(tmp_path), yarn, vocab_size=61)
    compatibility.check_same_model(store.newest(tmp_path), yarn, vocab_size=61, weights_only=True)


def test_a_learned_position_table_fixes_the_length(tmp_path):
    learned = Config(
        model=ModelConfig(position_embedding_type="learned_absolute"),
        data=DataConfig(seq_length=64),
    )
    write(tmp_path, 5, learned)
    with pytest.raises(CheckpointError, match="seq_length 48 there, 64 here.*--seq-length"):
        compatibility.check_same_model(store.newest(tmp_path), learned, vocab_size=61)


def test_a_new_run_may_change_options_that_do_not_change_tensors(tmp_path):
    write(tmp_path, 5)
    longer = ModelConfig(
        rope_scaling="yarn", rope_scaling_factor=4.0, window_size=16, padded_vocab_size=61
    )
    compatibility.check_same_model(
        store.newest(tmp_path), Config(model=longer), vocab_size=61, weights_only=True
    )
    with pytest.raises(CheckpointError) as refused:
        compatibility.check_same_model(store.newest(tmp_path), Config(model=longer), vocab_size=61)
    assert [problem.split()[0] for problem in refused.value.problems[1:]] == [
        "window_size",
        "rope_scaling",
        "rope_scaling_factor",
    ]
    with pytest.raises(CheckpointError, match="num_layers 4 there, 3 here.*--num-layers"):
        compatibility.check_same_model(
            store.newest(tmp_path),
            Config(model=ModelConfig(num_layers=3)),
            vocab_size=61,
            weights_only=True,
        )


def test_changed_data_options_are_listed_with_both_values(tmp_path):
    write(tmp_path, 5)
    stored = store.newest(tmp_path)
    assert compatibility.changed_data_options(stored, Config()) == []
    assert compatibility.changed_data_options(stored, Config(data=DataConfig(split=(98, 2)))) == []
    changed = Config(
        data=DataConfig(data_path=("0.7", "a", "0.3", "b"), seq_length=64),
        training=TrainingConfig(seed=1),
    )
    assert compatibility.changed_data_options(stored, changed) == [
        "data_path () there, ('0.7', 'a', '0.3', 'b') here",
        "seq_length 1024 there, 64 here",
        "seed 1234 there, 1 here",
    ]


def store_of(prefix: str, tokens: int = 100, sampled: str = "s", manifest: str = "m") -> dict:
    return {
        "prefix": prefix,
        "documents": 5,
        "tokens": tokens,
        "sampled_sha256": sampled,
        "manifest_sha256": manifest,
    }


def trained_on(*stores: dict, folder: Path) -> store.Stored:
    return store.Stored(folder, replace(state(5), data=list(stores)), ())


@pytest.mark.parametrize(
    "here",
    [
        [store_of("a"), store_of("b", 200)],
        [store_of("b", 200), store_of("a")],  # another order of the blend
        [store_of("moved/x"), store_of("elsewhere/b", 200)],
        [store_of("a", manifest=""), store_of("b", 200)],  # the manifest was deleted
    ],
)
def test_the_same_tokens_in_any_order_and_folder_are_the_same_data(here, tmp_path):
    compatibility.check_same_data(
        trained_on(store_of("a"), store_of("b", 200), folder=tmp_path), here
    )


@pytest.mark.parametrize(
    ("here", "stated"),
    [
        ([store_of("a", 300), store_of("b", 200)], ["store a: 100 tokens", "300 tokens"]),
        (
            [store_of("a", sampled="x"), store_of("b", 200)],
            ["store a: 100 tokens", "100 tokens", "other content"],
        ),
        (
            [store_of("a", manifest="x"), store_of("b", 200)],
            ["store a: 100 tokens", "other content"],
        ),
        ([store_of("a")], ["store b: 200 tokens", "not read here"]),
        (
            [store_of("a"), store_of("b", 200), store_of("c", 7)],
            ["store c: not read there", "7 tokens"],
        ),
        ([store_of("a"), store_of("a2"), store_of("b", 200)], ["store a2: not read there"]),
    ],
)
def test_other_data_is_refused_store_by_store_with_the_counts_and_the_flag(here, stated, tmp_path):
    with pytest.raises(CheckpointError, match="--allow-other-data") as refused:
        compatibility.check_same_data(
            trained_on(store_of("a"), store_of("b", 200), folder=tmp_path), here
        )
    [problem] = refused.value.problems[1:]
    assert all(part in problem for part in stated)


def test_a_checkpoint_without_fingerprints_is_resumed_on_any_data(tmp_path):
    compatibility.check_same_data(trained_on(folder=tmp_path), [store_of("a")])


def test_fingerprints_are_stored_in_the_state_and_old_states_have_none():
    with_data = replace(state(5), data=[store_of("a")])
    assert decode(encode(with_data, {}))[0] == with_data
    body = json.loads(encode(with_data, {}))
    del body["data"], body["sha256"]
    text = json.dumps(body, indent=2).removesuffix("\n}").encode()
    old = text + b',\n  "sha256": "%s"\n}\n' % hashlib.sha256(text).hexdigest().encode()
    assert decode(old)[0].data == []
