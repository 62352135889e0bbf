"""How the batch script starts ranks in a container: with an srun that only tells what it was given.

Neither Pyxis nor Apptainer is here: this holds the lines to what their manuals say, not to what they do.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/slurm/pretrain.sbatch"
# What comes before the ranks is done for the other nodes on this machine, unless REFUSE names it.
SRUN = """#!/bin/bash
if [[ $3 == bash ]]; then
    printf '%s\\n' "${@:1:3}" "${@: -1}" >before
    [[ ${@: -1} != "${REFUSE:-}" ]] && exec "${@:3}"
    exit 1
fi
printf '%s\\n' "$@" "TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-}" >ranks
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A function that runs the script with variables beside SLURM's, and returns the words that start the ranks."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_USER": "me",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    job |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_TMPDIR": str(tmp_path / "scratch")}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"

    (tmp_path / "scratch").mkdir()

    def run(code: int = 0, **variables: str) -> list[str]:
        environment = os.environ | job | {"PATH": path} | variables
        command = ["bash", SCRIPT, "--save", "my runs"]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
        )
        assert ended.returncode == code, ended.stderr
        return (
            (tmp_path / "ranks").read_text().splitlines()
            if code == 0
            else ended.stderr.splitlines()
        )

    for name in "IMAGE", "MOUNTS", "NODE_CACHE", "TRITON_CACHE_DIR":
        monkeypatch.delenv(name, raising=False)
    return run


def test_without_an_image_ranks_start_on_the_node_with_its_caches(given, tmp_path):
    *words, cache = given()
    assert words[-4:] == ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert not [word for word in words if "container" in word or "apptainer" in word]
    assert cache == f"TRITON_CACHE_DIR={tmp_path}/scratch/megatron_ring-me/triton"


def test_pyxis_is_given_an_image_with_the_caches_and_the_folder(given, tmp_path):
    *words, cache = given(IMAGE="/shared/ring.sqsh", MOUNTS="/data:/data")
    assert words[:3] == [
        "--container-image=/shared/ring.sqsh",
        f"--container-mounts={tmp_path}/scratch/megatron_ring-me:/cache,{tmp_path}:{tmp_path},/data:/data",
        f"--container-workdir={tmp_path}",
    ]
    assert words[-4:] == ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert cache == "TRITON_CACHE_DIR="  # the image's own counts


def test_apptainer_runs_within_the_rank(given, tmp_path):
    *words, cache = given(IMAGE="/shared/ring.sif")
    mounts = f"{tmp_path}/scratch/megatron_ring-me:/cache,{tmp_path}:{tmp_path}"
    exec_ = [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        mounts,
        "--pwd",
        str(tmp_path),
        "/shared/ring.sif",
    ]
    assert words[-len(exec_) - 4 :] == [
        *exec_,
        "python",
        f"{tmp_path}/pretrain_gpt.py",
        "--save",
        "my runs",
    ]
    assert cache == "TRITON_CACHE_DIR="


@pytest.mark.parametrize(
    "variables", [{}, {"IMAGE": "/shared/ring.sif"}], ids=["node", "container"]
)
def test_the_cache_is_made_first_on_every_node_for_its_user_alone(variables, given, tmp_path):
    given(**variables)
    *words, folder = (tmp_path / "before").read_text().splitlines()
    assert words == ["--ntasks=2", "--ntasks-per-node=1", "bash"]
    assert folder == f"{tmp_path}/scratch/megatron_ring-me"
    assert Path(folder).stat().st_mode & 0o777 == 0o700


def another_users(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make a folder of another user's")
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def open_to_a_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def link_to_an_own_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to("elsewhere")


def no_folder(folder: Path) -> None:
    folder.touch()


UNSAFE = another_users, open_to_all, open_to_a_group, link_to_an_own_folder, no_folder


@pytest.mark.parametrize("make", UNSAFE, ids=lambda make: make.__name__)
def test_a_cache_that_others_may_have_filled_is_not_used(make, given, tmp_path):
    make(tmp_path / "scratch/megatron_ring-me")
    *_, cache = given()
    folder = Path(cache.removeprefix("TRITON_CACHE_DIR=")).parent
    assert folder.parent == tmp_path / "scratch"
    assert re.fullmatch(r"megatron_ring-\w{10}", folder.name)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_is_unsafe_on_another_node_is_not_used(given, tmp_path):
    *_, cache = given(REFUSE=f"{tmp_path}/scratch/megatron_ring-me")
    assert re.search(r"/scratch/megatron_ring-\w{10}/triton$", cache)


def test_an_own_cache_that_others_cannot_write_to_is_used_again(given, tmp_path):
    folder = tmp_path / "scratch/megatron_ring-me"
    folder.mkdir()
    folder.chmod(0o755)
    *_, cache = given()
    assert cache == f"TRITON_CACHE_DIR={folder}/triton"


@pytest.mark.parametrize("make", UNSAFE, ids=lambda make: make.__name__)
def test_a_cache_that_was_asked_for_and_is_unsafe_is_refused(make, given, tmp_path):
    make(tmp_path / "mine")
    said = given(code=1, NODE_CACHE=str(tmp_path / "mine"))
    assert f"NODE_CACHE {tmp_path}/mine " in "\n".join(said)
    assert not (tmp_path / "ranks").exists()
