"""`make train` starts a rank for each GPU that it sees, up to two; two on a CPU."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEEPSPEED = "/deepspeed --log_level warning --num_gpus"


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    """An environment without CUDA_VISIBLE_DEVICES whose PATH begins with a folder for programs."""
    names = {"CUDA_VISIBLE_DEVICES", "MAKEFLAGS", "MAKELEVEL", "DS_ACCELERATOR"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return inherited | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def install_gpus(folder: Path, count: int, exit_code: int = 0) -> None:
    """Write an nvidia-smi that lists ``count`` GPUs, the first of them divided by MIG."""
    lines = [f"GPU {index}: H100 (UUID: GPU-{index})" for index in range(count)]
    lines.insert(1, "  MIG 1g.10gb     Device  0: (UUID: MIG-0)")
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    script.write_text(script.read_text() + f"exit {exit_code}\n")
    script.chmod(0o755)


def command(environ: dict[str, str]) -> str:
    """Return the command line by which `make train` starts ranks."""
    made = subprocess.run(
        ["make", "--dry-run", "train", "ARGS=--seed 5"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = made.stdout.replace("\\\n", " ").splitlines()
    [line] = [line for line in lines if "pretrain_gpt.py" in line]
    assert line.split()[-2:] == ["--seed", "5"]
    return line


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (8, 2)])
def test_a_rank_for_each_gpu_up_to_two(gpus, ranks, environ, tmp_path):
    install_gpus(tmp_path, gpus)
    line = command(environ)
    assert f"{DEEPSPEED} {ranks} pretrain_gpt.py" in line
    assert "DS_ACCELERATOR" not in line


def test_two_ranks_on_a_cpu(environ, tmp_path):
    install_gpus(tmp_path, 0, exit_code=9)  # nvidia-smi without a driver
    assert command(environ).startswith("DS_ACCELERATOR=cpu ")
    assert f"{DEEPSPEED} 2 pretrain_gpt.py" in command(environ)


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [("3", 1), ("GPU-3", 1), ("3,-1,2", 1), ("MIG-0", 1), ("3,1", 2), ("0,1,2", 2), ("0,1 ", 2)],
)
def test_cuda_visible_devices_restricts_them_and_reaches_the_ranks(
    visible, ranks, environ, tmp_path
):
    install_gpus(tmp_path, 4)
    line = command(environ | {"CUDA_VISIBLE_DEVICES": visible})
    assert f"/torchrun --nproc-per-node {ranks} pretrain_gpt.py" in " ".join(line.split())


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_without_a_visible_gpu_two_ranks_train_on_the_cpu(visible, environ, tmp_path):
    install_gpus(tmp_path, 4)
    line = command(environ | {"CUDA_VISIBLE_DEVICES": visible})
    assert line.startswith("DS_ACCELERATOR=cpu ")
    assert f"{DEEPSPEED} 2 pretrain_gpt.py" in line
