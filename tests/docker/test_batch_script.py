"""How the batch script starts ranks in a container: with an srun that only tells what it was given.

Neither Pyxis nor Apptainer is here: this holds the lines to what their manuals say, not to what they do.
"""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/slurm/pretrain.sbatch"
SRUN = """#!/bin/bash
[[ $3 == mkdir ]] && told=before || told=ranks
printf '%s\\n' "$@" "TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-}" >"$told"
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A function that runs the script with variables beside SLURM's, and returns the words that start the ranks."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_USER": "me", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    job |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_TMPDIR": "/scratch"}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"

    def run(**variables: str) -> list[str]:
        environment = os.environ | job | {"PATH": path} | variables
        subprocess.run(["bash", SCRIPT, "--save", "my runs"], cwd=tmp_path, env=environment, check=True, timeout=30)
        return (tmp_path / "ranks").read_text().splitlines()

    for name in "IMAGE", "MOUNTS", "NODE_CACHE", "TRITON_CACHE_DIR":
        monkeypatch.delenv(name, raising=False)
    return run


def test_without_an_image_ranks_start_on_the_node_with_its_caches(given, tmp_path):
    *words, cache = given()
    assert words[-4:] == ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert not [word for word in words if "container" in word or "apptainer" in word]
    assert cache == "TRITON_CACHE_DIR=/scratch/megatron_ring-me/triton"


def test_pyxis_is_given_an_image_with_the_caches_and_the_folder(given, tmp_path):
    *words, cache = given(IMAGE="/shared/ring.sqsh", MOUNTS="/data:/data")
    assert words[:3] == [
        "--container-image=/shared/ring.sqsh",
        f"--container-mounts=/scratch/megatron_ring-me:/cache,{tmp_path}:{tmp_path},/data:/data",
        f"--container-workdir={tmp_path}",
    ]
    assert words[-4:] == ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert cache == "TRITON_CACHE_DIR="  # the image's own counts


def test_apptainer_runs_within_the_rank(given, tmp_path):
    *words, cache = given(IMAGE="/shared/ring.sif")
    mounts = f"/scratch/megatron_ring-me:/cache,{tmp_path}:{tmp_path}"
    exec_ = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(tmp_path), "/shared/ring.sif"]
    assert words[-len(exec_) - 4 :] == [*exec_, "python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert cache == "TRITON_CACHE_DIR="


def test_what_is_mounted_is_made_first_on_every_node(given, tmp_path):
    given(IMAGE="/shared/ring.sif")
    *words, _ = (tmp_path / "before").read_text().splitlines()
    assert words == ["--ntasks=2", "--ntasks-per-node=1", "mkdir", "-p", "/scratch/megatron_ring-me"]
