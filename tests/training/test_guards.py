"""Bad steps: what is one, that it moves nothing anywhere, where it is traced to, and what follows it."""

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


def gradient_of(where: str, run: tiny.Run) -> list:
    """Have the gradient that enters the module of that name, where this rank has it, be nan, until it is removed."""

    def spoil(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    modules = run.engine.engine.module.named_modules()
    return [module.register_forward_hook(spoil) for name, module in modules if name.endswith(where)]


def one_step(run: tiny.Run, **how: float) -> StepResult:
    run.step += 1
    return run.engine.train_step(
        run.loader.next_step(), learning_rate(run.step, run.config.training), **how
    )


def bad_step(run: tiny.Run, rank: int) -> StepResult:
    """One in which a gradient in the feed-forward of the first layer is nan, on one rank, in a pipeline its first."""
    hooks = gradient_of("blocks.0.mlp", run) if rank == 1 or run.setup.grid.pipe > 1 else []
    result = one_step(run)
    for hook in hooks:
        hook.remove()
    return result


def miss_step(run: tiny.Run) -> None:
    run.loader.next_step()
    run.step += 1


def same(run: tiny.Run, other: tiny.Run) -> bool:
    """Weights, moments and the copies that compute uses, bit for bit; and their counts."""
    pieces = zip(run.engine.pieces(), other.engine.pieces(), strict=True)
    held = all(torch.equal(a.values[kind], b.values[kind]) for a, b in pieces for kind in KINDS)
    parameters = zip(run.parameters().values(), other.parameters().values(), strict=True)
    return (
        held
        and all(torch.equal(a, b) for a, b in parameters)
        and run.engine.optimizer_state() == other.engine.optimizer_state()
    )


# ---- a refused step moves nothing ----


def refuse(rank: int, world_size: int, prefix: Path, cases: dict[str, dict]) -> None:
    for name, sections in cases.items():
        disturbed, quiet = (
            tiny.Run(tiny.config(**sections), prefix, rank, world_size) for _ in range(2)
        )
        for step in ("bad", "good", "bad", "spike", "good", "good"):
            if step == "good":
                found = one_step(disturbed)
                assert found == one_step(quiet), name
                assert not found.refused
                continue
            found = (
                bad_step(disturbed, rank)
                if step == "bad"
                else one_step(disturbed, highest_loss=0.1)
            )
            miss_step(quiet)
            assert found.refused
            assert math.isfinite(found.loss), "the gradient alone is bad"
            assert math.isfinite(found.grad_norm) == (step == "spike")
        assert same(disturbed, quiet), name


@pytest.mark.parametrize("cases", [ZERO, PIPE], ids=["zero", "pipe"])
def test_a_refused_step_leaves_every_bit_as_it_was(cases, tmp_path):
    run_ranks(2, refuse, tiny.write_store(tmp_path), cases)


# ---- what follows it ----


class Said:
    """A report that remembers."""

    def __init__(self):
        self.lines, self.step = [], None

    def log(self, words: str) -> None:
        self.lines.append(words)

    def rewind_to(self, step: int) -> None:
        self.step = step


def guarded(run: tiny.Run, report: Said, saver: Saver | None = None) -> tuple[Guard, BadSteps]:
    guard = Guard(run.config.guards, run.state())
    return guard, BadSteps(run.engine, guard, saver or run.saver, report)


def answered(run: tiny.Run, rank: int, guard: Guard, bad_steps: BadSteps) -> None:
    """A bad step, and what follows it."""
    first = run.loader.consumed_samples
    result = bad_step(run, rank)
    guard.count(result)
    run.step = bad_steps.answer(run.step, result, range(first, run.loader.consumed_samples))


def going_back(folder: Path, **sections: dict) -> Config:
    folders = {"save": str(folder), "load": str(folder), "save_interval": 2}
    options = {"on_bad_step": "roll-back", "max_bad_steps": 2, "loss_spike_factor": 2.0}
    return tiny.config(checkpoint=folders, guards=options, **sections)


def go_back(rank: int, world_size: int, folder: Path, prefix: Path, cases: dict[str, dict]) -> None:
    for name, sections in cases.items():
        run, report = (
            tiny.Run(going_back(folder / name, **sections), prefix, rank, world_size),
            Said(),
        )
        guard, bad_steps = guarded(run, report)
        run.steps(2)
        path = run.save()
        guard.count(one_step(run))
        answered(run, rank, guard, bad_steps)
        assert (run.step, report.step, guard.roll_backs) == (2, 2, 1)
        assert guard.kept()["recent_losses"] == [], "it is measured as at the checkpoint"
        assert (
            f"its gradient norm is inf; it began on rank {0 if run.setup.grid.pipe > 1 else 1} ("
            in report.lines[0]
        )
        assert report.lines[0].endswith(f"back to {path}, and on with the samples behind these")

        resumed = tiny.Run(run.config, prefix, rank, world_size)
        resumed.resume(resumed.find())
        for _ in range(2):
            resumed.loader.next_step()
        assert run.steps(2) == resumed.steps(2), name
        assert same(run, resumed), name

        answered(run, rank, guard, bad_steps)
        with pytest.raises(
            Diverged,
            match=r"more than max_bad_steps 2 .*\.\n?.*--load .* goes on from step-00000002",
        ):
            answered(run, rank, guard, bad_steps)


@pytest.mark.parametrize(
    "cases",
    [{name: ZERO[name] for name in ("fp32-1", "bf16-3")}, {"pipe-bf16-1": PIPE["pipe-bf16-1"]}],
)
def test_a_run_goes_back_as_it_resumes_but_behind_the_samples_and_not_for_ever(cases, tmp_path):
    run_ranks(2, go_back, tmp_path, tiny.write_store(tmp_path), cases)


def go_back_to_weights(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    first = tiny.Run(tiny.config(checkpoint={"save": str(folder)}), prefix, rank, world_size)
    first.steps(2)
    first.save()
    config = going_back(folder / "second")
    weights = replace(
        config, checkpoint=replace(config.checkpoint, load=str(folder), finetune=True)
    )
    run = tiny.Run(weights, prefix, rank, world_size)
    guard, bad_steps = guarded(run, Said(), run.saver)
    with pytest.raises(Diverged, match="no checkpoint to go back to yet"):
        answered(run, rank, guard, bad_steps)

    saver = Saver(run.setup, run.consensus, begun_from=run.find())
    run.resume(run.find())
    guard, bad_steps = guarded(run, Said(), saver)
    expected = run.steps(2)
    answered(run, rank, guard, bad_steps)
    run.resume(run.find())
    assert run.steps(2) == expected, "with moments of its own"


def test_before_its_first_checkpoint_a_run_goes_back_to_that_of_another_or_ends(tmp_path):
    run_ranks(2, go_back_to_weights, tmp_path, tiny.write_store(tmp_path))


# ---- which steps are bad ----


def result(loss: float = 2.0, grad_norm: float = 1.0, refused: bool = False) -> StepResult:
    return StepResult(loss, grad_norm, 1, refused)


def guard(losses: list[float], **options) -> Guard:
    return Guard(GuardsConfig(**options), RunState(1, 1, 1, 1, recent_losses=losses))


@given(st.lists(st.floats(0.1, 100), min_size=16, max_size=40), st.floats(1.1, 10))
def test_a_spike_is_measured_by_the_median_of_the_last_good_losses(losses, factor):
    judge = guard([1e6], loss_spike_factor=factor, loss_spike_window=16)
    for loss in losses:
        judge.count(result(loss))
        judge.count(result(1e9, refused=True))
    assert judge.highest_loss == factor * statistics.median(losses[-16:])


def test_too_few_good_losses_are_no_measure_and_no_factor_is_no_limit():
    few = guard([2.0] * 15, loss_spike_factor=2)
    assert few.highest_loss == math.inf
    few.count(result())
    assert few.highest_loss == 4.0
    assert guard([2.0] * 100).highest_loss == math.inf


def test_a_checkpoint_keeps_the_measure_and_the_counts_where_there_is_a_factor():
    judge = guard([2.0] * 20, loss_spike_factor=2)
    judge.count(result(9.0, refused=True))
    kept = judge.kept()
    assert kept == {"skipped_steps": 1, "roll_backs": 0, "recent_losses": [2.0] * 20}
    again = Guard(judge.options, replace(RunState(1, 1, 1, 1), **kept))
    assert again.kept() == kept
    assert guard([2.0] * 20).kept()["recent_losses"] == []
    new_run = Stored(Path("step-00000001"), replace(RunState(1, 1, 1, 1), **kept), ()).for_new_run()
    assert Guard(judge.options, new_run.state).kept() == {
        "skipped_steps": 0,
        "roll_backs": 0,
        "recent_losses": [],
    }


@pytest.mark.parametrize("allowed", [0, 3])
def test_only_a_checkpoint_begins_the_count_of_bad_steps_anew(allowed):
    judge = guard([], max_bad_steps=allowed)
    for _ in range(2):
        for _ in range(allowed):
            judge.count(result(math.nan, refused=True))
            judge.count(result())
            assert not judge.stops
        judge.saved()
    for _ in range(allowed + 1):
        judge.count(result(math.nan, refused=True))
    assert judge.stops
    assert judge.skipped_steps == 3 * allowed, "one that ends the run is not skipped"


def test_a_checkpoint_without_a_good_step_before_it_does_not_begin_the_count_anew():
    judge = guard([], max_bad_steps=3)
    for bad in range(4):
        assert not judge.stops
        judge.count(result(math.nan, refused=True))
        judge.saved()
        assert judge.since_save == bad + 1
    assert judge.stops


def test_the_weights_of_a_checkpoint_that_is_gone_back_to_are_not_new():
    judge = guard([])
    assert not judge.good_since_save
    judge.count(result())
    assert judge.good_since_save
    judge.restore_loss_history(RunState(1, 1, 1, 1))
    assert not judge.good_since_save


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ({"loss": math.nan, "grad_norm": math.inf}, "its loss is nan"),
        ({"loss": math.inf}, "its loss is inf"),
        ({"grad_norm": math.inf}, "its gradient norm is inf"),
        (
            {"loss": 9.0},
            "its loss 9.0000 is above 4.0000, 2 x the median of the last 16 good steps",
        ),
    ],
)
def test_what_is_bad_is_said(bad, fault):
    assert guard([2.0] * 16, loss_spike_factor=2).fault(result(**bad, refused=True)) == fault


OPTIONS = {
    "max_bad_steps": (-1, "max_bad_steps -1 must not be below 0. Set --max-bad-steps."),
    "loss_spike_factor": (
        0.5,
        "loss_spike_factor 0.5 would refuse every other step: it must be above 1, or 0",
    ),
    "loss_spike_window": (
        15,
        "loss_spike_window 15 is too short .* at least 16. Set --loss-spike-window.",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_met(name):
    value, message = OPTIONS[name]
    (problem,) = GuardsConfig(**{name: value}).problems()
    assert re.match(message, problem)
    assert GuardsConfig().problems() == []


# ---- where it began ----


def seen(
    rank: int, loss: bool = True, forward: tuple = (), backward: tuple = ()
) -> NonFiniteReport:
    return NonFiniteReport(rank, "node", loss, list(forward), list(backward))


@pytest.mark.parametrize(
    ("of_ranks", "words"),
    [
        (
            [seen(0, False, (3, 3.5)), seen(1, False, (2.5, 3))],
            "rank 1 (node), in what the attention of layer 3 gave",
        ),
        (
            [seen(0, False, (2,)), seen(1, False, (2,))],
            "rank 0 (node), rank 1 (node), in what layer 2 gave",
        ),
        ([seen(0, True, (), (0,)), seen(1, False, (), (0,))], "rank 1 (node), in the loss itself"),
        (
            [seen(0, True, (), (0, 1)), seen(1, True, (), (0,))],
            "rank 0 (node), in the gradient of what layer 1 gave",
        ),
    ],
)
def test_it_began_where_it_was_first(of_ranks, words):
    assert origin(of_ranks) == f"it began on {words}"


def test_what_no_layer_has_seen_is_a_weight_s():
    assert "it began in a weight's gradient" in origin([seen(0), seen(1)])


def test_the_lookout_sees_layers_and_attentions_in_both_directions():
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({"5": torch.nn.Linear(2, 2)})})
    model["blocks"]["5"].attention = torch.nn.Linear(2, 2)
    lookout, layer = NonFiniteDetector(model, torch.device("cpu")), model["blocks"]["5"]

    def passed(into: torch.Tensor, factor: float) -> NonFiniteReport:
        lookout.begin()
        (layer(layer.attention(into)).sum() * factor).backward()
        return lookout.seen(3, torch.tensor(1.0))

    assert (passed(torch.ones(2), 1).forward, passed(torch.ones(2), 1).backward) == ([], [])
    assert passed(torch.tensor([math.inf, 0]), 1).forward == [5, 4.5]
    assert (passed(torch.ones(2), math.nan).forward, passed(torch.ones(2), math.nan).backward) == (
        [],
        [5, 4.5],
    )
    assert passed(torch.ones(2), 1) == NonFiniteReport(3, socket.gethostname(), True, [], [])
