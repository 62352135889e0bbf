"""The mean of checkpoints is computed in float64 and written completely or not at all."""

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
    """Write three checkpoints, of which the newest is not the last."""
    return [written(folder, step, imagined.weights(step, dtype)) for step in (5, 15, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5]])
def test_the_mean_has_the_values_in_float64_and_the_dtype_of_the_first(tmp_path, dtype, weights):
    mean = Summary.of(average(tmp_path / "out", three(tmp_path, dtype), weights))
    whole = [imagined.weights(step, dtype) for step in (5, 15, 10)]
    for name in whole[0]:
        terms = [weight * tensors[name].double() for weight, tensors in zip(weights, whole)]
        expected = sum(terms) / sum(weights)
        read = mean.tensors.read(name)
        assert read.dtype == dtype
        # Bit for bit: the order of a float64 sum does not show in narrower dtypes.
        assert torch.equal(read, expected.to(dtype))


def test_the_mean_of_equal_checkpoints_equals_them(tmp_path):
    equal = [written(tmp_path, step, imagined.weights()) for step in (5, 10, 15)]
    mean = Summary.of(average(tmp_path / "out", equal, [1.0, 1.0, 1.0]))
    for name, values in imagined.weights().items():
        assert torch.equal(mean.tensors.read(name), values)


def test_the_mean_has_weights_only_and_the_step_and_config_of_the_newest(tmp_path):
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


def test_a_non_finite_mean_is_not_written(tmp_path):
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


def test_checkpoints_of_other_models_are_refused_with_every_difference(tmp_path):
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
    title, *problems = refused.value.problems
    assert str(first.path) in title
    expected = [
        (wider.path, "model.num_layers is 2, not 4"),
        (wider.path, "norm.weight has shape (4,), not (5,)"),
        (renamed.path, "vocab_size is 8, not 7"),
        (renamed.path, "blocks.0.mlp.down_proj.weight is missing"),
        (renamed.path, "blocks.0.moe.down_proj.weight is unexpected"),
    ]
    for problem, (path, difference) in zip(problems, expected, strict=True):
        assert f"{path}: {difference}" in problem
    assert not (tmp_path / "out").exists()


def test_a_folder_with_checkpoints_is_not_written_to(tmp_path):
    checkpoints = three(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000015.* OUT "):
        average(tmp_path, checkpoints, [1.0] * 3)
    assert store.newest(tmp_path).state.optimizer_steps == 10


def test_a_mean_that_cannot_be_written_leaves_no_files(tmp_path, monkeypatch):
    def full(*_):
        raise CheckpointError("part-00000.safetensors: No space left on device")

    checkpoints = three(tmp_path / "runs")
    monkeypatch.setattr(tensors, "write_part", full)
    with pytest.raises(
        CheckpointError, match="the mean cannot be written to .*out: part-00000.*: No space left"
    ):
        average(tmp_path / "out", checkpoints, [1.0] * 3)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_a_run_holds_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    held = lease.take(tmp_path / "out", lease.Owner.here())
    with pytest.raises(CheckpointError, match=f"pid {os.getpid()}"):
        average(tmp_path / "out", [], [])
    held.release()
