"""The mean of checkpoints is that of their whole tensors in float64, of one model, written whole or not at all."""

import os
from dataclasses import replace

import pytest
import torch

from megatron_ring.checkpoint import lease, store, tensors
from megatron_ring.checkpoint.average import average
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.config import CheckpointConfig, Config, ModelConfig
from megatron_ring.errors import CheckpointError
from tests.checkpoint import imagined


def written(
    folder, step: int, whole: dict[str, torch.Tensor], config: Config | None = None
) -> Summary:
    return Summary.of(imagined.write(folder, step, {"weight": whole}, config))


def three(folder, dtype: torch.dtype = torch.float32) -> list[Summary]:
    """The newest is not the last."""
    return [written(folder, step, imagined.weights(step, dtype)) for step in (5, 15, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5]])
def test_the_mean_is_that_of_the_whole_tensors_in_the_type_of_the_first(tmp_path, dtype, weights):
    found = Summary.of(average(tmp_path / "out", three(tmp_path, dtype), weights))
    whole = [imagined.weights(step, dtype) for step in (5, 15, 10)]
    for name in whole[0]:
        expected = sum(w * one[name].double() for w, one in zip(weights, whole)) / sum(weights)
        read = found.tensors.read(name)
        assert read.dtype == dtype
        # To the last bit: float64 leaves room for the order of the sum.
        assert torch.equal(read, expected.to(dtype))


def test_the_mean_of_what_is_the_same_is_the_same(tmp_path):
    same = [written(tmp_path, step, imagined.weights()) for step in (5, 10, 15)]
    found = Summary.of(average(tmp_path / "out", same, [1.0, 1.0, 1.0]))
    assert all(
        torch.equal(found.tensors.read(name), values) for name, values in imagined.weights().items()
    )


def test_it_is_a_checkpoint_of_weights_alone_where_the_newest_was(tmp_path):
    config = Config(checkpoint=CheckpointConfig(save="runs/a", keep_last=1))
    checkpoints = [
        written(tmp_path / "a", 5, imagined.weights()),
        written(tmp_path / "b", 10, imagined.weights(), config),
    ]
    average(tmp_path / "out", checkpoints, [1.0, 3.0])
    stored = store.newest(tmp_path / "out")
    newest = checkpoints[1].state
    assert (stored.state.step, stored.state.consumed_samples) == (10, newest.consumed_samples)
    assert (stored.state.optimizer_steps, Summary.of(stored.path).tensors.kinds) == (0, ("weight",))
    assert (
        stored.state.processes
        == f"1, for the mean of 1 x {checkpoints[0].path}, 3 x {checkpoints[1].path}"
    )
    assert Summary.of(stored.path).config == config


def test_no_mean_is_written_that_is_not_finite(tmp_path):
    whole = imagined.weights()
    whole["norm.weight"][2] = torch.nan
    with imagined.unchecked():
        checkpoints = [
            written(tmp_path / "a", 5, imagined.weights()),
            written(tmp_path / "b", 10, whole),
        ]
    with pytest.raises(CheckpointError, match=r"weight/norm.weight.* has 1 value that is nan"):
        average(tmp_path / "out", checkpoints, [1.0, 3.0])
    assert list((tmp_path / "out").iterdir()) == []


def test_other_models_are_refused_with_all_that_differs(tmp_path):
    base = imagined.weights()
    first = written(tmp_path, 5, base)
    wider = written(
        tmp_path, 10, base | {"norm.weight": torch.ones(4)}, Config(model=ModelConfig(num_layers=2))
    )
    renamed = written(
        tmp_path, 15, {name.replace("mlp", "moe"): values for name, values in base.items()}
    )
    renamed = replace(renamed, state=replace(renamed.state, vocab_size=8))
    with pytest.raises(CheckpointError) as refused:
        average(tmp_path / "out", [first, wider, renamed], [1.0] * 3)
    assert refused.value.problems == [
        f"{first.path} is a checkpoint of another model than:",
        f"{wider.path}: model.num_layers is 2, not 4.",
        f"{wider.path}: norm.weight has shape (4,), not (5,).",
        f"{renamed.path}: vocab_size is 8, not 7.",
        f"{renamed.path}: blocks.0.mlp.down_proj.weight is missing.",
        f"{renamed.path}: blocks.0.moe.down_proj.weight is there as well.",
    ]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_checkpoints_is_left_as_it_is(tmp_path):
    checkpoints = three(tmp_path)
    with pytest.raises(
        CheckpointError, match="holds checkpoints already, such as step-00000015. Give OUT another"
    ):
        average(tmp_path, checkpoints, [1.0] * 3)
    assert store.newest(tmp_path).state.optimizer_steps == 10


def test_a_mean_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise CheckpointError("part-00000.safetensors: No space left on device")

    checkpoints = three(tmp_path / "runs")
    monkeypatch.setattr(tensors, "write_part", full)
    with pytest.raises(
        CheckpointError, match="the mean cannot be written to .*out: part-00000.*: No space left"
    ):
        average(tmp_path / "out", checkpoints, [1.0] * 3)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_a_run_holds_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    held = lease.take(tmp_path / "out", lease.Owner.here())
    with pytest.raises(CheckpointError, match=f"pid {os.getpid()}"):
        average(tmp_path / "out", [], [])
    held.release()
