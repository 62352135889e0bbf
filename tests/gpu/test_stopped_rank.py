"""The program with one of two ranks stopped: the other names it and exits with 76."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from megatron_ring.errors import RingStalled
from tests.distributed import local_rank
from tests.gpu.devices import each_device_long_on_cpu, skip_without
from tests.programs import PROGRAM, free_port, working_folder

SMALL = """\
model: {num_layers: 2, hidden_size: 128, num_attention_heads: 2}
parallel: {context_parallel: striped, ring_timeout: TIMEOUT}
data: {split: [1.0, 0.0], data_path: [text/tokens], seq_length: 256}
training: {train_iters: 1000000, eval_interval: 0}
logging: {metrics_file: metrics.jsonl}
"""
# Must exceed the difference between the times at which two ranks have compiled their kernels.
TIMEOUT = {"cuda": 15, "cpu": 4}
START_SECONDS = 120
EXIT_SECONDS = 90


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def ranks(device, tmp_path) -> list[subprocess.Popen]:
    """Two ranks that would train for hours, without a launcher; each writes to log.RANK."""
    skip_without(device, ranks=2)
    working_folder(tmp_path, SMALL.replace("TIMEOUT", str(TIMEOUT[device])))
    port = free_port()
    started = []
    for rank in range(2):
        gpu = local_rank(rank, 2) if device == "cuda" else rank
        world = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(gpu)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with open(tmp_path / f"log.{rank}", "w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, PROGRAM, "--config", "small.yaml"],
                    cwd=tmp_path,
                    env=os.environ | world | {"GLOO_SOCKET_IFNAME": "lo"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    yield started
    for process in started:
        process.kill()
        process.wait()


@each_device_long_on_cpu
def test_a_stopped_rank_is_named_and_the_other_exits_with_76(device, ranks, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    log = tmp_path / "log.0"

    def is_training() -> bool:
        ended = [process.poll() for process in ranks if process.poll() is not None]
        assert not ended, "".join(path.read_text() for path in sorted(tmp_path.glob("log.*")))
        return metrics.exists() and metrics.read_text().count("\n") > 3

    wait_until(is_training, START_SECONDS)
    ranks[1].send_signal(signal.SIGSTOP)
    assert ranks[0].wait(EXIT_SECONDS) == RingStalled.exit_code
    (line,) = re.findall(r"RingStalled: (rank 0 .*)", log.read_text())
    assert re.search(r"^rank 0 \(.*, pid \d+\) .* step \d+.*; rank 1 \(.*\) .*stopped", line)
