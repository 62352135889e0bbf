"""A checkpoint is resumed by the model that it is of, and by no other."""

import pytest

from megatron_ring.checkpoint import fit, store
from megatron_ring.config import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import write


def test_another_model_is_refused_size_by_size(tmp_path):
    write(tmp_path, 5, Config(model=ModelConfig(num_layers=2, hidden_size=128)))
    with pytest.raises(CheckpointError) as refused:
        fit.check_same_model(store.newest(tmp_path), Config(), vocab_size=4096)
    assert refused.value.problems == [
        f"{tmp_path}/step-00000005 is a checkpoint of another model:",
        "num_layers 2 there, 4 here. Set --num-layers.",
        "hidden_size 128 there, 256 here. Set --hidden-size.",
        "vocab_size 61 there, 4096 here. Set --tokenizer-model or --padded-vocab-size.",
    ]


def test_a_learned_position_table_fixes_the_length(tmp_path):
    learned = Config(model=ModelConfig(position_embedding_type="learned_absolute"), data=DataConfig(seq_length=64))
    write(tmp_path, 5, learned)
    with pytest.raises(CheckpointError, match="seq_length 48 there, 64 here. Set --seq-length"):
        fit.check_same_model(store.newest(tmp_path), learned, vocab_size=61)


def test_a_new_run_may_compute_otherwise_with_the_same_tensors(tmp_path):
    write(tmp_path, 5)
    longer = ModelConfig(rope_scaling="yarn", rope_scaling_factor=4.0, window_size=16, padded_vocab_size=61)
    fit.check_same_model(store.newest(tmp_path), Config(model=longer), vocab_size=61, tensors_alone=True)
    with pytest.raises(CheckpointError) as refused:
        fit.check_same_model(store.newest(tmp_path), Config(model=longer), vocab_size=61)
    assert [problem.split()[0] for problem in refused.value.problems[1:]] == [
        "window_size", "rope_scaling", "rope_scaling_factor",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="num_layers 4 there, 3 here"):
        fit.check_same_model(
            store.newest(tmp_path), Config(model=ModelConfig(num_layers=3)), vocab_size=61, tensors_alone=True
        )


def test_other_data_is_told(tmp_path):
    write(tmp_path, 5)
    found = store.newest(tmp_path)
    assert fit.other_data(found, Config()) == []
    changed = Config(
        data=DataConfig(data_path=("0.7", "a", "0.3", "b"), seq_length=64), training=TrainingConfig(seed=1)
    )
    assert fit.other_data(found, changed) == [
        "data_path () there, ('0.7', 'a', '0.3', 'b') here",
        "seq_length 1024 there, 64 here",
        "seed 1234 there, 1 here",
    ]
