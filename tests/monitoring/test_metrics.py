"""The metrics file has its public keys in order; console, monitors and summary agree with it."""

import json
import math
import pickle
import re

import pytest

from megatron_ring.config import LoggingConfig
from megatron_ring.monitoring.metrics import (
    ConsoleReporter,
    EvenlySampled,
    HeldOutRecord,
    StepRecord,
)
from megatron_ring.monitoring.plot import draw_loss

STEP = {
    "step": 1,
    "loss": 2.5,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "tokens": 96,
    "tokens_per_second": 960.0,
    "step_seconds": 0.1,
    "data_seconds": 0.001,
    "model_flops": 1e8,
    "skipped_steps": 0,
    "roll_backs": 0,
    "full_attention_flops": 1.5e8,
}
VALIDATION, TEST = HeldOutRecord(1, "validation", 2.4, 1.2), HeldOutRecord(2, "test", 2.3, 1.1)


@pytest.fixture
def monitored() -> list:
    return []


@pytest.fixture
def report(tmp_path, monitored) -> ConsoleReporter:
    logging = LoggingConfig(metrics_file=str(tmp_path / "new" / "metrics.jsonl"))
    return ConsoleReporter(
        logging, range(1, 3), peak_flops=1e10, monitors={"list": monitored.extend}
    )


def test_a_step_a_validation_and_the_test_write_one_json_object_each(report, tmp_path):
    report.step(StepRecord(**STEP))
    report.held_out(VALIDATION)
    report.held_out(TEST)
    step, *held_out = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(step).items()) == list(STEP.items())
    assert held_out == [
        '{"step": 1, "validation_loss": 2.4, "validation_bits_per_byte": 1.2}',
        '{"step": 2, "test_loss": 2.3, "test_bits_per_byte": 1.1}',
    ]


def test_a_run_from_step_0_starts_a_new_file_and_renames_the_earlier_one(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    earlier = json.dumps({"step": 0, "validation_loss": 9.0}) + "\n"
    file.write_text(earlier)
    ConsoleReporter(LoggingConfig(metrics_file=str(file)), range(1, 3), 1e10, monitors={})
    assert not file.exists()
    assert (tmp_path / "metrics.jsonl.1").read_text() == earlier
    assert capsys.readouterr().out.count("metrics.jsonl.1") == 1


def test_monitors_receive_the_values_of_the_file(report, monitored):
    report.step(StepRecord(**STEP))
    report.held_out(VALIDATION)
    report.held_out(TEST)
    assert ("train/loss", 2.5, 1) in monitored
    assert monitored[len(STEP) - 1 :] == [
        ("validation/loss", 2.4, 1),
        ("validation/bits_per_byte", 1.2, 1),
        ("test/loss", 2.3, 2),
        ("test/bits_per_byte", 1.1, 2),
    ]


def test_the_console_line_shows_progress_and_throughput(report, capsys):
    report.step(StepRecord(**STEP))
    line = (
        "step      1/2  loss 2.5000  grad norm 1.000  lr 1.00e-03  "
        "960 tokens/s (10% of peak FLOP/s, MFU 15%)"
    )
    assert line in capsys.readouterr().out


def test_without_a_known_peak_no_utilisation_is_shown(capsys):
    report = ConsoleReporter(LoggingConfig(), range(1, 3), peak_flops=None, monitors={})
    report.step(StepRecord(**STEP))
    assert "960 tokens/s  ETA" in capsys.readouterr().out
    assert report.close().endswith("960 tokens/s (median)")


def test_the_console_shows_held_out_losses(report, capsys):
    report.held_out(VALIDATION)
    report.held_out(TEST)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "step      1  validation loss 2.4000, 1.2000 bits per byte",
        "step      2  test loss 2.3000, 1.1000 bits per byte",
    ]


def test_the_summary_shows_the_change_of_the_validation_loss(report):
    report.held_out(HeldOutRecord(0, "validation", 5.0, 3.0))
    report.step(StepRecord(**STEP))
    report.held_out(HeldOutRecord(1, "validation", 2.5, 1.5))
    report.held_out(TEST)
    summary = report.close()
    assert "3.0000 -> 1.5000 bits per byte (-50%)" in summary
    assert "960 tokens/s (median), 10% of peak FLOP/s, MFU 15%" in summary


def test_the_summary_of_a_run_with_one_validation_shows_no_change(report):
    report.step(StepRecord(**STEP))
    report.held_out(HeldOutRecord(1, "validation", 2.5, 1.5))
    lines = report.close().splitlines()
    assert "held-out text    1.5000 bits per byte" in lines


def test_non_finite_values_are_null_in_the_file_and_unchanged_for_monitors(
    report, monitored, tmp_path, capsys
):
    report.step(StepRecord(**STEP | {"loss": math.nan, "grad_norm": math.inf}))
    report.held_out(HeldOutRecord(1, "validation", math.nan, math.nan))
    step, validation = map(
        json.loads, (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    )
    assert step == STEP | {"loss": None, "grad_norm": None}
    assert validation == {"step": 1, "validation_loss": None, "validation_bits_per_byte": None}
    assert ("train/grad_norm", math.inf, 1) in monitored
    assert "the validation loss is not finite" in capsys.readouterr().out
    draw_loss(tmp_path / "new" / "metrics.jsonl", tmp_path / "loss.png")


def test_after_a_roll_back_the_file_and_the_summary_have_every_step_once(report, tmp_path):
    for step, loss, roll_backs in ((1, 4.0, 0), (2, math.nan, 1), (2, 3.0, 1)):
        report.step(StepRecord(**STEP | {"step": step, "loss": loss, "roll_backs": roll_backs}))
        if math.isnan(loss):
            report.rewind_to(1)
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [4.0, 3.0]
    summary = report.close()
    assert "4.0000 -> 3.0000 in 2 steps" in summary
    assert "bad steps        0 skipped, 1 followed by a roll back" in summary


def test_a_resumed_run_continues_the_file_at_the_checkpoints_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)))
    report = ConsoleReporter(LoggingConfig(metrics_file=str(file)), range(3, 5), 1e10, monitors={})
    report.step(StepRecord(**STEP | {"step": 3}))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_failing_output_warns_once_and_the_others_continue(tmp_path, monitored, capsys):
    def fail(events: list) -> None:
        raise ConnectionError("no route")

    file = tmp_path / "metrics.jsonl"
    monitors = {"wandb": fail, "list": monitored.extend}
    report = ConsoleReporter(LoggingConfig(metrics_file=str(file)), range(1, 3), 1e10, monitors)
    file.mkdir()
    for step in (1, 2):
        report.step(StepRecord(**STEP | {"step": step}))
        report.flush()
    file.rmdir()
    report.held_out(TEST)
    out = capsys.readouterr().out
    for message in ("wandb failed", f"--metrics-file {file} failed", "step      2/2"):
        assert out.count(message) == 1
    assert {step for _, _, step in monitored} == {1, 2}
    assert json.loads(file.read_text())["step"] == 2
    summary = report.close()
    assert "wandb failed 3 times" in summary
    assert "failed 2 times" in summary


def test_the_memory_of_a_report_does_not_grow_with_the_steps(tmp_path):
    """The summary uses the first and the last step and a sample of the speeds."""
    report = ConsoleReporter(LoggingConfig(log_interval=10**6), range(1, 12_001), 1e10, monitors={})
    sizes = []
    for step in range(1, 12_001):
        values = {"step": step, "loss": 10 - step / 4_000, "tokens_per_second": float(step)}
        report.step(StepRecord(**STEP | values))
        if step % 10 == 1:
            report.held_out(HeldOutRecord(step, "validation", 2.0, 4 - step / 4_000))
        if step in (6_000, 9_000, 12_000):
            kept = report.first, report.last, report.validations, report.step_seconds
            sizes.append(len(pickle.dumps(kept)))
            assert 2048 <= len(report.rates.values) <= 4096
    assert max(sizes) < 1.01 * sizes[0]
    summary = report.close()
    assert "-> 7.0000 in 12000 steps" in summary
    assert "-> 1.0023 bits per byte" in summary
    [median] = re.findall(r"([\d,]+) tokens/s \(median\)", summary)
    assert abs(int(median.replace(",", "")) - 6_000) <= 10


def test_a_sampled_series_is_evenly_spaced_and_bounded():
    series = EvenlySampled[int](8)
    for value in range(8):
        series.add(value)
    assert series.values == [*range(8)]
    for value in range(8, 100):
        series.add(value)
        assert len(series.values) <= 8
    assert series.values == [*range(0, 100, 16)]
    assert series.stride == 16


def test_a_plot_of_many_steps_shows_evenly_spaced_ones(tmp_path):
    lines = [json.dumps(STEP | {"step": step}) + "\n" for step in range(1, 4100)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4100, "lo')
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.svg")
    assert "one of 2 is drawn" in (tmp_path / "loss.svg").read_text()
