"""Jobs of two nodes on a real SLURM: what stops them, and that they end as if nothing had.

A job is given more steps than it can do; once it was stopped, the last step is put a few ahead of where it got to. So
whatever the machine's speed it is stopped under way, and the learning rate, which is constant, does not tell.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ring.checkpoint import names
from tests.slurm.cluster import Cluster, until

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
RECIPE = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 256, split: [1, 0, 0]}
training: {train_iters: %d, lr_warmup_iters: 1, lr_decay_style: constant, eval_interval: 0, dtype: fp32}
logging: {log_interval: 100}
"""
SBATCH = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
ENOUGH = 1_000_000


class Job:
    """A run under the batch script of this repository, in a folder of its own; it saves and resumes there."""

    def __init__(
        self,
        cluster: Cluster,
        text: Path,
        folder: Path,
        last_step: int,
        sbatch: list[str],
        *flags: str,
    ):
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        (folder / "text").symlink_to(text)
        self.end_at(last_step)
        environment = {
            "PYTHON": sys.executable,
            "PROGRAM": str(ROOT / "pretrain_gpt.py"),
            "LOGS": "logs",
        }
        environment |= {
            "NODE_CACHE": str(folder / "cache"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            "sbatch",
            "--parsable",
            f"--chdir={folder}",
            *SBATCH,
            *sbatch,
            f"{ROOT}/tools/slurm/pretrain.sbatch",
        ]
        run = [
            "--config",
            "run.yaml",
            "--save",
            "saved",
            "--load",
            "saved",
            "--metrics-file",
            "metrics.jsonl",
        ]
        self.number = cluster.ask(*command, *run, *flags, environment=environment)

    @property
    def state(self) -> str:
        shown = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.number)
        return shown.partition("JobState=")[2].split()[0]

    @property
    def said(self) -> str:
        logs = [*self.folder.glob("slurm-*.log"), *(self.folder / "logs").glob("*")]
        return "\n".join(f"{log.name}: {log.read_text()}" for log in logs)

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of each step, in the order of the file."""
        file = self.folder / "metrics.jsonl"
        records = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [(record["step"], record["loss"], record["grad_norm"]) for record in records]

    def end_at(self, last_step: int) -> None:
        (self.folder / "run.yaml").write_text(RECIPE % last_step)

    def until(self, state: str, seconds: float) -> None:
        until(
            lambda: (
                self.state in (state, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            ),
            seconds,
        )
        assert self.state == state, self.said

    def start_again(self) -> None:
        """Soon, not after the two minutes that SLURM lets a requeued job wait, and with time to finish.

        Not at once either: a node refuses a job that it was told to end within the same second.
        """
        self.cluster.ask(
            "scontrol", "update", f"JobId={self.number}", "StartTime=now+5", "TimeLimit=5"
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with a store of tokens."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "page.txt").write_text("\n".join(f"line {i} of the page" for i in range(800)))
    prepare = [
        sys.executable,
        f"{ROOT}/tools/prepare_data.py",
        "--input",
        "page.txt",
        "--output-prefix",
        "tokens",
    ]
    subprocess.run([*prepare, "--vocab-size", "300"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def stopped(cluster, text, tmp_path_factory) -> Job:
    """A job that a time limit of a minute has stopped once."""
    folder = tmp_path_factory.mktemp("jobs") / "stopped"
    job = Job(cluster, text, folder, ENOUGH, ["--time=1", "--signal=B:USR1@5"])
    job.until("RUNNING", seconds=30)
    job.until("PENDING", seconds=120)
    job.end_at(job.losses[-1][0] + 10)
    job.start_again()
    job.until("COMPLETED", seconds=120)
    return job


@pytest.fixture(scope="module")
def straight(cluster, text, stopped, tmp_path_factory) -> list[tuple[int, float, float]]:
    """The losses of a job that nothing has stopped."""
    job = Job(
        cluster,
        text,
        tmp_path_factory.mktemp("jobs") / "straight",
        stopped.losses[-1][0],
        ["--time=5"],
    )
    job.until("COMPLETED", seconds=240)
    return job.losses


def test_a_time_limit_requeues_a_job_that_has_lost_and_repeated_no_step(stopped, straight):
    assert stopped.losses == straight
    assert "exit code 75: requeued" in stopped.said
    assert stopped.said.count("resuming         saved/step-") == 1
    assert "Traceback" not in stopped.said


def test_after_a_node_has_failed_a_job_goes_on_from_the_newest_checkpoint_on_another(
    cluster, text, straight, tmp_path
):
    job = Job(cluster, text, tmp_path / "failed", ENOUGH, ["--time=5"], "--save-interval", "20")
    until(lambda: len(names.checkpoints(tmp_path / "failed" / "saved")) > 1)
    cluster.kill_node("node2")
    job.until("PENDING", seconds=100)
    saved, reached = newest_step(job), job.losses[-1][0]
    job.end_at(reached + 10)
    job.start_again()
    job.until("COMPLETED", seconds=120)
    assert f"resuming         saved/step-{saved:08d}" in job.said
    assert job.losses == straight[: reached + 10]


def newest_step(job: Job) -> int:
    return int((job.folder / "saved" / "latest").read_text().removeprefix("step-"))


def test_ranks_that_are_dealt_out_in_turn_are_refused(cluster, text):
    srun = [
        "srun",
        "--nodes=2",
        "--ntasks=4",
        "--overcommit",
        "--distribution=cyclic",
        sys.executable,
    ]
    flags = [f"{ROOT}/pretrain_gpt.py", "--data-path", f"{text}/tokens", "--split", "1", "0", "0"]
    refused = subprocess.run(
        [*srun, *flags], env=cluster.environment, cwd=text, capture_output=True, text=True
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("srun runs ranks 0, 2 on this node") == 1
    assert "Traceback" not in refused.stderr
