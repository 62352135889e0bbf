"""Bad steps: which are refused, that a refused step changes nothing, how a run continues."""

import math
import re
import socket
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.store import Stored
from megatron_ring.checkpoint.tensors import KINDS
from megatron_ring.config import Config, GuardsConfig
from megatron_ring.engine.engine import StepResult
from megatron_ring.errors import Diverged
from megatron_ring.monitoring.non_finite import NonFiniteDetector, NonFiniteReport, origin
from megatron_ring.training.bad_steps import BadSteps, Guard
from megatron_ring.training.checkpointing import Saver
from megatron_ring.training.schedule import learning_rate
from tests.distributed import run_ranks
from tests.training import tiny

ZERO = {
    f"{dtype}-{stage}": {"training": {"dtype": dtype, "zero_stage": stage}}
    for dtype in ("fp32", "bf16")
    for stage in (0, 1, 2, 3)
}
PIPE = {
    f"pipe-{name}": sections | {"parallel": {"pipeline_model_parallel_size": 2}}
    for name, sections in ZERO.items()
    if sections["training"]["zero_stage"] < 2
}


def make_gradient_nan(module_name: str, run: tiny.Run) -> list:
    """Make the gradient that enters a module nan, if this rank has the module.

    Returns the hooks; removing them ends it.
    """

    def spoil(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    return [
        module.register_forward_hook(spoil)
        for name, module in run.engine.engine.module.named_modules()
        if name.endswith(module_name)
    ]


def one_step(run: tiny.Run, **options: float) -> StepResult:
    run.step += 1
    rate = learning_rate(run.step, run.config.training)
    return run.engine.train_step(run.loader.next_step(), rate, **options)


def bad_step(run: tiny.Run, rank: int) -> StepResult:
    """Run a step in which one rank has a nan gradient in the first layer's feed-forward.

    It is rank 1, or the first stage of a pipeline.
    """
    hooks = []
    if rank == 1 or run.setup.grid.pipe > 1:
        hooks = make_gradient_nan("blocks.0.mlp", run)
    result = one_step(run)
    for hook in hooks:
        hook.remove()
    return result


def skip_samples(run: tiny.Run) -> None:
    run.loader.next_step()
    run.step += 1


def is_same(run: tiny.Run, other: tiny.Run) -> bool:
    """Whether weights, moments, compute copies of weights and step counts are equal bit for bit."""
    pieces = zip(run.engine.pieces(), other.engine.pieces(), strict=True)
    same_pieces = all(
        torch.equal(a.values[kind], b.values[kind]) for a, b in pieces for kind in KINDS
    )
    parameters = zip(run.parameters().values(), other.parameters().values(), strict=True)
    same_parameters = all(torch.equal(a, b) for a, b in parameters)
    same_counters = run.engine.optimizer_counters() == other.engine.optimizer_counters()
    return same_pieces and same_parameters and same_counters


# ---- a refused step changes nothing ----


def refuse_steps(rank: int, world_size: int, prefix: Path, cases: dict[str, dict]) -> None:
    for name, sections in cases.items():
        config = tiny.config(**sections)
        disturbed, undisturbed = (tiny.Run(config, prefix, rank, world_size) for _ in range(2))
        for step in ("bad", "good", "bad", "spike", "good", "good"):
            if step == "good":
                result = one_step(disturbed)
                assert result == one_step(undisturbed), name
                assert not result.refused
                continue
            is_spike = step == "spike"
            result = (
                one_step(disturbed, highest_loss=0.1) if is_spike else bad_step(disturbed, rank)
            )
            skip_samples(undisturbed)
            assert result.refused
            assert math.isfinite(result.loss), "only the gradient is bad"
            assert math.isfinite(result.grad_norm) == is_spike
        assert is_same(disturbed, undisturbed), name


@pytest.mark.parametrize("cases", [ZERO, PIPE], ids=["zero", "pipe"])
def test_a_refused_step_leaves_every_bit_as_it_was(cases, tmp_path):
    run_ranks(2, refuse_steps, tiny.write_store(tmp_path), cases)


# ---- roll back and stop ----


class RecordedReport:
    """A report that keeps what it is given."""

    def __init__(self):
        self.lines: list[str] = []
        self.rewound_to: int | None = None

    def log(self, line: str) -> None:
        self.lines.append(line)

    def rewind_to(self, step: int) -> None:
        self.rewound_to = step


def bad_steps_of(
    run: tiny.Run, report: RecordedReport, saver: Saver | None = None
) -> tuple[Guard, BadSteps]:
    guard = Guard(run.config.guards, run.state())
    return guard, BadSteps(run.engine, guard, saver or run.saver, report)


def handle_bad_step(run: tiny.Run, rank: int, guard: Guard, bad_steps: BadSteps) -> None:
    """Run a bad step and continue the run as BadSteps decides."""
    first_sample = run.loader.consumed_samples
    result = bad_step(run, rank)
    guard.count(result)
    samples = range(first_sample, run.loader.consumed_samples)
    run.step = bad_steps.handle(run.step, result, samples)


def roll_back_config(folder: Path, **sections: dict) -> Config:
    folders = {"save": str(folder), "load": str(folder), "save_interval": 2}
    options = {"on_bad_step": "roll-back", "max_bad_steps": 2, "loss_spike_factor": 2.0}
    return tiny.config(checkpoint=folders, guards=options, **sections)


def roll_back(
    rank: int, world_size: int, folder: Path, prefix: Path, cases: dict[str, dict]
) -> None:
    for name, sections in cases.items():
        run = tiny.Run(roll_back_config(folder / name, **sections), prefix, rank, world_size)
        report = RecordedReport()
        guard, bad_steps = bad_steps_of(run, report)
        run.steps(2)
        path = run.save()
        guard.count(one_step(run))
        handle_bad_step(run, rank, guard, bad_steps)
        assert (run.step, report.rewound_to, guard.roll_backs) == (2, 2, 1)
        assert guard.state()["recent_losses"] == [], "as in the checkpoint"
        bad_rank = 0 if run.setup.grid.pipe > 1 else 1
        assert "its gradient norm is inf" in report.lines[0]
        assert f"rank {bad_rank} (" in report.lines[0]
        assert f"rolled back to {path}," in report.lines[0]

        resumed = tiny.Run(run.config, prefix, rank, world_size)
        resumed.resume(resumed.find())
        for _ in range(2):
            resumed.loader.next_step()
        assert run.steps(2) == resumed.steps(2), name
        assert is_same(run, resumed), name

        handle_bad_step(run, rank, guard, bad_steps)
        message = r"more than max_bad_steps 2 .*\.\n?.*--load .* continues from step-00000002"
        with pytest.raises(Diverged, match=message):
            handle_bad_step(run, rank, guard, bad_steps)


@pytest.mark.parametrize(
    "cases",
    [{name: ZERO[name] for name in ("fp32-1", "bf16-3")}, {"pipe-bf16-1": PIPE["pipe-bf16-1"]}],
)
def test_a_roll_back_equals_a_resume_with_the_following_samples_and_their_number_is_limited(
    cases, tmp_path
):
    run_ranks(2, roll_back, tmp_path, tiny.write_store(tmp_path), cases)


def roll_back_to_weights(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    first = tiny.Run(tiny.config(checkpoint={"save": str(folder)}), prefix, rank, world_size)
    first.steps(2)
    first.save()
    config = roll_back_config(folder / "second")
    finetune = replace(
        config, checkpoint=replace(config.checkpoint, load=str(folder), finetune=True)
    )
    run = tiny.Run(finetune, prefix, rank, world_size)
    guard, bad_steps = bad_steps_of(run, RecordedReport(), run.saver)
    with pytest.raises(Diverged, match="no checkpoint to go back to yet"):
        handle_bad_step(run, rank, guard, bad_steps)

    saver = Saver(run.setup, run.consensus, resumed_from=run.find())
    run.resume(run.find())
    guard, bad_steps = bad_steps_of(run, RecordedReport(), saver)
    expected = run.steps(2)
    handle_bad_step(run, rank, guard, bad_steps)
    run.resume(run.find())
    assert run.steps(2) == expected, "moments are reset"


def test_before_its_first_checkpoint_a_run_rolls_back_to_its_initial_weights_or_ends(tmp_path):
    run_ranks(2, roll_back_to_weights, tmp_path, tiny.write_store(tmp_path))


# ---- which steps are bad ----


def result(loss: float = 2.0, grad_norm: float = 1.0, refused: bool = False) -> StepResult:
    return StepResult(loss, grad_norm, 1, refused)


def guard_with(losses: list[float], **options) -> Guard:
    return Guard(GuardsConfig(**options), RunState(1, 1, 1, 1, recent_losses=losses))


@given(st.lists(st.floats(0.1, 100), min_size=16, max_size=40), st.floats(1.1, 10))
def test_a_spike_is_measured_by_the_median_of_the_last_good_losses(losses, factor):
    guard = guard_with([1e6], loss_spike_factor=factor, loss_spike_window=16)
    for loss in losses:
        guard.count(result(loss))
        guard.count(result(1e9, refused=True))
    assert guard.highest_loss == factor * statistics.median(losses[-16:])


def test_there_is_no_limit_with_too_few_good_losses_or_without_a_factor():
    guard = guard_with([2.0] * 15, loss_spike_factor=2)
    assert guard.highest_loss == math.inf
    guard.count(result())
    assert guard.highest_loss == 4.0
    assert guard_with([2.0] * 100).highest_loss == math.inf


def test_a_checkpoint_keeps_the_counts_and_with_a_factor_the_losses():
    guard = guard_with([2.0] * 20, loss_spike_factor=2)
    guard.count(result(9.0, refused=True))
    state = guard.state()
    assert state == {"skipped_steps": 1, "roll_backs": 0, "recent_losses": [2.0] * 20}
    resumed = Guard(guard.options, replace(RunState(1, 1, 1, 1), **state))
    assert resumed.state() == state
    assert guard_with([2.0] * 20).state()["recent_losses"] == []
    stored = Stored(Path("step-00000001"), replace(RunState(1, 1, 1, 1), **state), ())
    assert Guard(guard.options, stored.for_new_run().state).state() == {
        "skipped_steps": 0,
        "roll_backs": 0,
        "recent_losses": [],
    }


@pytest.mark.parametrize("allowed", [0, 3])
def test_bad_steps_are_counted_between_checkpoints(allowed):
    guard = guard_with([], max_bad_steps=allowed)
    for _ in range(2):
        for _ in range(allowed):
            guard.count(result(math.nan, refused=True))
            guard.count(result())
            assert not guard.stops
        guard.saved()
    for _ in range(allowed + 1):
        guard.count(result(math.nan, refused=True))
    assert guard.stops
    assert guard.skipped_steps == 3 * allowed, "the one that ends the run is not skipped"


def test_a_checkpoint_without_a_good_step_before_it_does_not_reset_the_count():
    guard = guard_with([], max_bad_steps=3)
    for bad in range(4):
        assert not guard.stops
        guard.count(result(math.nan, refused=True))
        guard.saved()
        assert guard.since_save == bad + 1
    assert guard.stops


def test_after_a_roll_back_there_is_no_good_step_since_the_checkpoint():
    guard = guard_with([])
    assert not guard.good_since_save
    guard.count(result())
    assert guard.good_since_save
    guard.restore_loss_history(RunState(1, 1, 1, 1))
    assert not guard.good_since_save


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        ({"loss": math.nan, "grad_norm": math.inf}, ["loss is nan"]),
        ({"loss": math.inf}, ["loss is inf"]),
        ({"grad_norm": math.inf}, ["gradient norm is inf"]),
        ({"loss": 9.0}, ["loss 9.0000", "above 4.0000", "2 x the median", "16 good steps"]),
    ],
)
def test_the_reason_names_the_value_and_the_limit(bad, parts):
    reason = guard_with([2.0] * 16, loss_spike_factor=2).reason(result(**bad, refused=True))
    assert re.search(".*".join(map(re.escape, parts)), reason)


ILLEGAL_OPTIONS = {
    "max_bad_steps": (-1, r"max_bad_steps -1 .*\b0\b.* Set --max-bad-steps"),
    "loss_spike_factor": (0.5, r"loss_spike_factor 0.5 .*\b1\b.*\b0\b"),
    "loss_spike_window": (15, r"loss_spike_window 15 .*\b16\. Set --loss-spike-window"),
}


@pytest.mark.parametrize("name", ILLEGAL_OPTIONS)
def test_an_illegal_option_is_refused_with_the_legal_values(name):
    value, message = ILLEGAL_OPTIONS[name]
    (problem,) = GuardsConfig(**{name: value}).problems()
    assert re.match(message, problem)
    assert GuardsConfig().problems() == []


# ---- where non-finite values began ----


def report_of(
    rank: int, finite_loss: bool = True, forward: tuple = (), backward: tuple = ()
) -> NonFiniteReport:
    return NonFiniteReport(rank, "node", finite_loss, list(forward), list(backward))


@pytest.mark.parametrize(
    ("reports", "parts"),
    [
        (
            [report_of(0, False, (3, 3.5)), report_of(1, False, (2.5, 3))],
            ["rank 1 (node)", "attention of layer 3"],
        ),
        (
            [report_of(0, False, (2,)), report_of(1, False, (2,))],
            ["rank 0 (node), rank 1 (node)", "layer 2"],
        ),
        ([report_of(0, True, (), (0,)), report_of(1, False, (), (0,))], ["rank 1 (node)", "loss"]),
        (
            [report_of(0, True, (), (0, 1)), report_of(1, True, (), (0,))],
            ["rank 0 (node)", "gradient", "layer 1"],
        ),
    ],
)
def test_the_origin_is_the_first_layer_forward_or_the_last_backward(reports, parts):
    described = origin(reports)
    assert re.search(".*".join(map(re.escape, parts)), described)
    assert ("gradient" in described) == ("gradient" in parts)
    named_ranks = set(re.findall(r"rank \d", described))
    assert named_ranks == set(re.findall(r"rank \d", parts[0]))


def test_without_a_layer_the_origin_is_a_weight_gradient():
    assert "weight" in origin([report_of(0), report_of(1)])


def test_the_detector_reports_layers_and_attentions_in_both_directions():
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({"5": torch.nn.Linear(2, 2)})})
    layer = model["blocks"]["5"]
    layer.attention = torch.nn.Linear(2, 2)
    detector = NonFiniteDetector(model, torch.device("cpu"))

    def run_step(inputs: torch.Tensor, factor: float) -> NonFiniteReport:
        detector.begin()
        (layer(layer.attention(inputs)).sum() * factor).backward()
        return detector.seen(3, torch.tensor(1.0))

    host = socket.gethostname()
    assert run_step(torch.ones(2), 1) == NonFiniteReport(3, host, True, [], [])
    assert run_step(torch.tensor([math.inf, 0]), 1).forward == [5, 4.5]
    bad_gradient = run_step(torch.ones(2), math.nan)
    assert (bad_gradient.forward, bad_gradient.backward) == ([], [5, 4.5])
    assert run_step(torch.ones(2), 1) == NonFiniteReport(3, host, True, [], [])
