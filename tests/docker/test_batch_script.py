"""How the batch script starts ranks in a container, with an srun that records its arguments.

Neither Pyxis nor Apptainer is available here: these tests check the arguments against the manuals
of both, not against the programs.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/slurm/pretrain.sbatch"
# Steps before the ranks run here instead of on the other nodes. They fail for the folder REFUSE.
SRUN = """#!/bin/bash
if [[ $3 == bash ]]; then
    printf '%s\\n' "${@:1:3}" "${@: -1}" >before
    [[ ${@: -1} != "${REFUSE:-}" ]] && exec "${@:3}"
    exit 1
fi
printf '%s\\n' "$@" "TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-}" >ranks
"""


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Return a function that runs the script with further variables and checks its exit code.

    Returns the arguments that start the ranks, or the lines of stderr if the script fails.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    (tmp_path / "scratch").mkdir()
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_USER": "me",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_TMPDIR": str(tmp_path / "scratch"),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    for name in ("IMAGE", "MOUNTS", "NODE_CACHE", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def run(code: int = 0, **variables: str) -> list[str]:
        done = subprocess.run(
            ["bash", SCRIPT, "--save", "my runs"],
            cwd=tmp_path,
            env=os.environ | job | variables,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == code, done.stderr
        if code:
            return done.stderr.splitlines()
        return (tmp_path / "ranks").read_text().splitlines()

    return run


def test_without_an_image_ranks_start_on_the_node_with_its_caches(run_script, tmp_path):
    *arguments, cache = run_script()
    assert arguments[-4:] == ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert not [word for word in arguments if "container" in word or "apptainer" in word]
    assert cache == f"TRITON_CACHE_DIR={tmp_path}/scratch/megatron_ring-me/triton"


def test_pyxis_gets_the_image_the_caches_and_the_working_directory(run_script, tmp_path):
    *arguments, cache = run_script(IMAGE="/shared/ring.sqsh", MOUNTS="/data:/data")
    node_cache = f"{tmp_path}/scratch/megatron_ring-me"
    assert arguments[:3] == [
        "--container-image=/shared/ring.sqsh",
        f"--container-mounts={node_cache}:/cache,{tmp_path}:{tmp_path},/data:/data",
        f"--container-workdir={tmp_path}",
    ]
    assert arguments[-4:] == ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    assert cache == "TRITON_CACHE_DIR="  # the image sets its own


def test_apptainer_starts_each_rank(run_script, tmp_path):
    *arguments, cache = run_script(IMAGE="/shared/ring.sif")
    mounts = f"{tmp_path}/scratch/megatron_ring-me:/cache,{tmp_path}:{tmp_path}"
    apptainer = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(tmp_path)]
    program = ["python", f"{tmp_path}/pretrain_gpt.py", "--save", "my runs"]
    expected = [*apptainer, "/shared/ring.sif", *program]
    assert arguments[-len(expected) :] == expected
    assert cache == "TRITON_CACHE_DIR="


@pytest.mark.parametrize(
    "variables", [{}, {"IMAGE": "/shared/ring.sif"}], ids=["node", "container"]
)
def test_the_cache_is_created_first_on_every_node_for_its_user_only(
    variables, run_script, tmp_path
):
    run_script(**variables)
    *arguments, folder = (tmp_path / "before").read_text().splitlines()
    assert arguments == ["--ntasks=2", "--ntasks-per-node=1", "bash"]
    assert folder == f"{tmp_path}/scratch/megatron_ring-me"
    assert Path(folder).stat().st_mode & 0o777 == 0o700


def owned_by_another_user(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can create a folder of another user")
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


def not_a_folder(folder: Path) -> None:
    folder.touch()


each_unsafe = pytest.mark.parametrize(
    "make",
    [owned_by_another_user, open_to_all, open_to_a_group, link_to_an_own_folder, not_a_folder],
    ids=lambda make: make.__name__,
)


@each_unsafe
def test_an_unsafe_default_cache_is_replaced_by_a_new_folder(make, run_script, tmp_path):
    make(tmp_path / "scratch/megatron_ring-me")
    *_, cache = run_script()
    folder = Path(cache.removeprefix("TRITON_CACHE_DIR=")).parent
    assert folder.parent == tmp_path / "scratch"
    assert re.fullmatch(r"megatron_ring-\w{10}", folder.name)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_is_unsafe_on_another_node_is_replaced(run_script, tmp_path):
    *_, cache = run_script(REFUSE=f"{tmp_path}/scratch/megatron_ring-me")
    assert re.search(r"/scratch/megatron_ring-\w{10}/triton$", cache)


def test_an_own_cache_that_others_cannot_write_to_is_used_again(run_script, tmp_path):
    folder = tmp_path / "scratch/megatron_ring-me"
    folder.mkdir()
    folder.chmod(0o755)
    *_, cache = run_script()
    assert cache == f"TRITON_CACHE_DIR={folder}/triton"


@each_unsafe
def test_an_unsafe_requested_cache_is_rejected(make, run_script, tmp_path):
    make(tmp_path / "mine")
    stderr = run_script(code=1, NODE_CACHE=str(tmp_path / "mine"))
    assert f"NODE_CACHE {tmp_path}/mine " in "\n".join(stderr)
    assert not (tmp_path / "ranks").exists()
