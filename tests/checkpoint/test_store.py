"""A checkpoint is whole or not there; what is damaged is passed over and named."""

from pathlib import Path

import pytest

from megatron_ring.checkpoint import store
from megatron_ring.config import Config, DataConfig, ModelConfig, load_yaml
from megatron_ring.errors import CheckpointError

SPLIT = {"data_context_size": 2, "tensor_size": 1, "pipe_size": 2, "zero_stage": 1}


def state(step: int, **changes) -> store.RunState:
    sizes = {"vocab_size": 61, "seq_length": 48}
    return store.RunState(step=step, consumed_samples=4 * step, **SPLIT | sizes | changes)


def write(folder: Path, step: int, config: Config | None = None, **changes) -> Path:
    store.prepare(folder, step)
    (folder / store.partial_name(step) / "rank-0.pt").write_bytes(b"weights of step %d" % step)
    return store.commit(folder, state(step, **changes), config or Config())


def test_the_newest_whole_checkpoint_is_found_with_its_state(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    found = store.newest(tmp_path)
    assert (found.path, found.state, found.skipped) == (path, state(10), ())
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert load_yaml(path / "config.yaml") == Config()


def test_a_run_that_starts_afresh_in_the_folder_of_a_longer_one_is_the_newest(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    fresh = write(tmp_path, 5)
    assert store.newest(tmp_path).path == fresh


def test_without_the_pointer_the_last_step_is_the_newest(tmp_path):
    for step in (5, 10):
        path = write(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert store.newest(tmp_path).path == path


def test_one_that_is_being_written_is_not_there_yet(tmp_path):
    write(tmp_path, 5)
    store.prepare(tmp_path, 10)
    (tmp_path / store.partial_name(10) / "rank-0.pt").write_bytes(b"half of the wei")
    assert store.newest(tmp_path).state.step == 5


def test_a_failed_one_leaves_nothing_behind(tmp_path):
    write(tmp_path, 5)
    store.prepare(tmp_path, 10)
    store.discard(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_writing_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 5, zero_stage=3)
    assert store.newest(tmp_path).state.zero_stage == 3


def test_an_empty_folder_holds_none(tmp_path):
    assert store.newest(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "rank-0.pt").write_bytes(b"short"), "rank-0.pt has 5 bytes, 18 were written"),
        (lambda path: (path / "rank-0.pt").unlink(), "rank-0.pt is missing, 18 were written"),
        (lambda path: (path / "state.json").unlink(), "its state.json is missing or damaged"),
        (lambda path: (path / "state.json").write_text("{"), "its state.json is missing or damaged"),
        (lambda path: (path / "state.json").write_text('{"files": {}}'), "its state.json is missing or damaged"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_passed_over_and_named(tmp_path, damage, reason):
    good = write(tmp_path, 5)
    damage(write(tmp_path, 10))
    found = store.newest(tmp_path)
    assert found.path == good
    assert found.skipped == (f"{tmp_path}/step-00000010 is passed over: {reason}.",)


def test_where_none_is_whole_all_are_named(tmp_path):
    for step in (5, 10):
        (write(tmp_path, step) / "rank-0.pt").unlink()
    with pytest.raises(CheckpointError) as refused:
        store.newest(tmp_path)
    named = [problem.split()[0] for problem in refused.value.problems]
    assert named == [f"{tmp_path}", f"{tmp_path}/step-00000010", f"{tmp_path}/step-00000005"]


def test_another_model_is_refused_size_by_size(tmp_path):
    write(tmp_path, 5, Config(model=ModelConfig(num_layers=2, hidden_size=128)))
    with pytest.raises(CheckpointError) as refused:
        store.check_same_model(store.newest(tmp_path), Config(), vocab_size=4096)
    assert refused.value.problems == [
        f"{tmp_path}/step-00000005 is a checkpoint of another model:",
        "num_layers 2 there, 4 here. Set --num-layers.",
        "hidden_size 128 there, 256 here. Set --hidden-size.",
        "vocab_size 61 there, 4096 here. Set --tokenizer-model.",
    ]


def test_a_learned_position_table_fixes_the_length(tmp_path):
    learned = Config(model=ModelConfig(position_embedding_type="learned_absolute"), data=DataConfig(seq_length=64))
    write(tmp_path, 5, learned)
    with pytest.raises(CheckpointError, match="seq_length 48 there, 64 here. Set --seq-length"):
        store.check_same_model(store.newest(tmp_path), learned, vocab_size=61)


def test_another_split_is_refused_with_the_number_to_start(tmp_path):
    write(tmp_path, 5)
    found = store.newest(tmp_path)
    store.check_same_split(found, **SPLIT)
    refused = {
        "over 2 data x context ranks .ZeRO 1., this run has 4. Start 2 times": {"data_context_size": 4},
        "written with zero_stage 1, this run has 2. Set --zero-stage 1": {"zero_stage": 2},
        "over 1 tensor ranks, this run has 2. Set --tensor-model-parallel-size 1": {"tensor_size": 2},
        "over 2 pipeline ranks, this run has 1. Set --pipeline-model-parallel-size 2": {"pipe_size": 1},
    }
    for said, changes in refused.items():
        with pytest.raises(CheckpointError, match=said):
            store.check_same_split(found, **SPLIT | changes)


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match="cannot write a checkpoint to .*file/folder: Not a directory. Set --save"
    ):
        store.prepare(tmp_path / "file" / "folder", 5)
