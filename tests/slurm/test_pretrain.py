"""Jobs of two nodes on a real SLURM: interrupted jobs end like uninterrupted ones.

A job starts with more steps than it can do. After it was interrupted, its last step is set a few
steps ahead of the one it reached. It is therefore interrupted under way on any machine; the
learning rate is constant and does not depend on the number of steps.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ring.checkpoint import names
from tests.slurm.cluster import Cluster, wait_until

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
RECIPE = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 256, split: [1, 0, 0]}
training:
  train_iters: %d
  lr_warmup_iters: 1
  lr_decay_style: constant
  eval_interval: 0
  dtype: fp32
logging: {log_interval: 100}
"""
SBATCH = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
MORE_THAN_ENOUGH = 1_000_000  # steps
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job:
    """A run under this repository's batch script that saves and resumes in its own folder."""

    def __init__(
        self,
        cluster: Cluster,
        text: Path,
        folder: Path,
        last_step: int,
        sbatch: list[str],
        *flags: str,
    ):
        self.cluster = cluster
        self.folder = folder
        folder.mkdir()
        (folder / "text").symlink_to(text)
        self.set_last_step(last_step)
        environment = {
            "PYTHON": sys.executable,
            "PROGRAM": str(ROOT / "pretrain_gpt.py"),
            "LOGS": "logs",
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
        self.id = cluster.run(*command, *run, *flags, environment=environment)

    @property
    def state(self) -> str:
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return shown.partition("JobState=")[2].split()[0]

    @property
    def output(self) -> str:
        """The logs of the batch script and of all ranks."""
        logs = [*self.folder.glob("slurm-*.log"), *(self.folder / "logs").glob("*")]
        return "\n".join(f"{log.name}: {log.read_text()}" for log in logs)

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of each step, in the order of the file."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return []
        records = [json.loads(line) for line in file.read_text().splitlines()]
        return [(record["step"], record["loss"], record["grad_norm"]) for record in records]

    def set_last_step(self, last_step: int) -> None:
        (self.folder / "run.yaml").write_text(RECIPE % last_step)

    def wait_for(self, state: str, seconds: float) -> None:
        """Wait until the job is in ``state``; fail with its output if it ends in another one."""
        wait_until(lambda: self.state in (state, *ENDED), seconds)
        assert self.state == state, self.output

    def restart_soon(self) -> None:
        """Restart a requeued job in five seconds, with enough time to finish.

        SLURM would restart it after two minutes. At once is too soon: a node rejects a job that it
        ended within the same second.
        """
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+5", "TimeLimit=5")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Return a folder with a token store."""
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
def interrupted(cluster, text, tmp_path_factory) -> Job:
    """Return a finished job that was interrupted once, 25 s before its time limit of one minute."""
    folder = tmp_path_factory.mktemp("jobs") / "interrupted"
    job = Job(cluster, text, folder, MORE_THAN_ENOUGH, ["--time=1", "--signal=B:USR1@25"])
    job.wait_for("RUNNING", seconds=30)
    job.wait_for("PENDING", seconds=120)
    job.set_last_step(job.losses[-1][0] + 10)
    job.restart_soon()
    job.wait_for("COMPLETED", seconds=120)
    return job


@pytest.fixture(scope="module")
def uninterrupted(cluster, text, interrupted, tmp_path_factory) -> list[tuple[int, float, float]]:
    """Return the losses of a job that was never interrupted."""
    job = Job(
        cluster,
        text,
        tmp_path_factory.mktemp("jobs") / "uninterrupted",
        interrupted.losses[-1][0],
        ["--time=5"],
    )
    job.wait_for("COMPLETED", seconds=240)
    return job.losses


def test_a_job_requeued_at_its_time_limit_loses_and_repeats_no_step(interrupted, uninterrupted):
    assert interrupted.losses == uninterrupted
    assert "exit code 75: requeued" in interrupted.output
    assert interrupted.output.count("resuming         saved/step-") == 1
    assert "Traceback" not in interrupted.output


def test_after_a_node_failure_a_job_continues_on_another_from_its_newest_checkpoint(
    cluster, text, uninterrupted, tmp_path
):
    job = Job(
        cluster, text, tmp_path / "failed", MORE_THAN_ENOUGH, ["--time=5"], "--save-interval", "20"
    )
    wait_until(lambda: len(names.checkpoints(tmp_path / "failed" / "saved")) > 1)
    cluster.kill_node("node2")
    job.wait_for("PENDING", seconds=100)
    saved = newest_step(job)
    reached = job.losses[-1][0]
    job.set_last_step(reached + 10)
    job.restart_soon()
    job.wait_for("COMPLETED", seconds=120)
    assert f"resuming         saved/step-{saved:08d}" in job.output
    assert job.losses == uninterrupted[: reached + 10]


def newest_step(job: Job) -> int:
    return int((job.folder / "saved" / "latest").read_text().removeprefix("step-"))


def test_a_cyclic_distribution_of_ranks_is_rejected(cluster, text):
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
