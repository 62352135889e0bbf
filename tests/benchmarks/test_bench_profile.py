"""The profile benchmark on a CPU, in threads and processes, and on simulated devices."""

import contextlib
import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_profile
from benchmarks.recorded_ring import Reading, RecordedRing, make_trackers
from benchmarks.streamed_ring import NullStream, Streams
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.device_clock import cuda_event
from tests.benchmarks import commands
from tests.programs import free_port
from tests.simulated_device import Device, NotComplete

LAYERS = 2
HEADS = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32"]
SMALL = ["--device", "cpu", "--tokens", "32", "--layers", str(LAYERS), "--rounds", "2", *HEADS]


def check_findings(findings: dict, ranks: int, ranks_in_json: int) -> None:
    assert findings["failures"] == []
    assert findings["step_seconds"].keys() == {"off", "stragglers", "profile"}
    assert findings["overhead"].keys() == {"stragglers", "profile"}
    assert len(findings["rounds"]) == 2
    assert len(findings["readings"]) == 3
    for step in findings["readings"]:
        assert len(step) == ranks_in_json
        for reading in step:
            assert 0 < reading["compute"] + reading["wait"] <= reading["ring"]
            # A row for each hop forward and backward, besides others.
            assert reading["rows"] > 2 * LAYERS * ranks
            assert reading["missed"] == 0


def test_ranks_that_are_threads(tmp_path):
    file = tmp_path / "profile.json"
    flags = [*SMALL, "--ranks", "3", "--json", file]
    stdout = commands.run("bench_profile", *flags, check=True).stdout
    check_findings(json.loads(file.read_text()), ranks=3, ranks_in_json=3)
    assert "3 ranks as threads" in stdout
    assert stdout.count("overhead") == 2


def test_ranks_that_are_processes(tmp_path):
    file = tmp_path / "profile.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    program = ["--master-port", free_port(), "-m", "benchmarks.bench_profile"]
    environment = commands.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, *program, *SMALL, "--json", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    findings = json.loads(file.read_text())
    check_findings(findings, ranks=2, ranks_in_json=1)
    assert findings["ranks"] == "processes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "1"], "ranks 1 .*at least 2.*--ranks"),
        (["--kv-heads", "3"], "heads 4 .*multiple of kv_heads 3.*--heads or --kv-heads"),
        (["--layers", "0"], "layers 0 .*at least 1.*--layers"),
        (["--device", "cuda"], "no GPU.*--device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options_are_rejected(flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        bench_profile._check(bench_profile._parser().parse_args([*SMALL, *flags]))


# ---- as on a GPU ----


@pytest.fixture
def on_devices() -> tuple[RecordedRing, list[Device]]:
    """Return a ring of two ranks whose streams, events and kernels are simulated."""
    local = threading.local()

    @contextlib.contextmanager
    def on(stream: NullStream):
        outer = getattr(local, "device", None)
        local.device = getattr(stream, "device", outer)
        yield
        local.device = outer

    def stream_of(device: Device) -> NullStream:
        stream = NullStream()
        stream.device = device
        return stream

    class Kernel:
        @staticmethod
        def forward(*inputs) -> None:
            local.device.launch(10**6)

        backward = forward

    def synchronize() -> None:
        for device in devices:
            device.synchronize()

    devices = [Device(rank) for rank in range(2)]
    ring = RecordedRing.build(bench_profile._parser().parse_args([*SMALL, "--ranks", "2"]), None)
    ranks = [
        replace(rank, trackers=make_trackers(1000, device.new_event))
        for rank, device in zip(ring.ranks, devices)
    ]
    streams = [Streams(stream_of(device), NullStream(), on) for device in devices]
    changes = {"new_event": lambda: local.device.new_event(), "synchronize": synchronize}
    return replace(ring, ranks=ranks, streams=streams, kernel=Kernel, **changes), devices


def test_on_devices_hops_add_up_to_the_passes_and_events_are_counted(on_devices):
    ring, devices = on_devices
    for reading in ring.timed_step():
        # Forward two kernels of 1 ms; backward one more, as the work on own keys is split.
        assert reading.compute == pytest.approx(LAYERS * 5e-3, rel=1e-2)
        assert bench_profile._problems(ring, 0, reading) == []

    def recorded(mode: str) -> list[int]:
        before = [device.recorded for device in devices]
        ring.step(mode)
        return [device.recorded - number for device, number in zip(devices, before)]

    ranks = len(devices)
    assert recorded("off") == [0] * ranks
    assert recorded("stragglers") == [1 + LAYERS * (9 * ranks - 5)] * ranks
    assert recorded("profile") == [1 + LAYERS * (14 * ranks - 8)] * ranks


def test_reading_before_the_device_is_done_fails(on_devices):
    ring, _ = on_devices
    with pytest.raises(NotComplete):
        replace(ring, synchronize=lambda: None).timed_step()


@pytest.mark.parametrize(
    ("reading", "problem"),
    [
        (Reading(1.0, 0.0, 1.0, 9, 0), ""),
        (Reading(0.6, 0.3, 1.0, 9, 0), "are missing"),
        (Reading(1.0, 0.2, 1.0, 9, 0), "more than the passes take"),
        (Reading(1.0, 0.0, 1.0, 9, 3), "3 rows did not fit"),
    ],
)
def test_a_reading_that_contradicts_the_stopwatch_is_a_failure(reading, problem, on_devices):
    ring, _ = on_devices
    problems = bench_profile._problems(ring, 0, reading)
    assert len(problems) == bool(problem)
    assert all(problem in line for line in problems)


@pytest.mark.parametrize(("factor", "fails"), [(1.015, False), (1.03, True)])
def test_an_overhead_of_two_percent_is_a_failure_on_a_gpu(factor, fails, on_devices, monkeypatch):
    ring, _ = on_devices
    seconds = {"off": 1.0, "stragglers": 1.001, "profile": factor}
    monkeypatch.setattr(RecordedRing, "step", lambda self, mode: seconds[mode])
    findings = bench_profile.measure(ring, rounds=2)
    assert findings["overhead"]["profile"] == pytest.approx(factor - 1)
    assert bool(findings["failures"]) == fails


def test_the_events_on_a_gpu_have_timing(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **flags: asked.append(flags))
    cuda_event()
    assert asked == [{"enable_timing": True}]
