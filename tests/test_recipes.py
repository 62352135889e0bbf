"""Every recipe in configs/ can be planned; those for GPUs fit them and have a batch script."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_ring.config import load_yaml
from megatron_ring.plan.memory_report import memory_of_stages
from megatron_ring.plan.parameters import parameter_count
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.console import plan

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "tools" / "slurm"
PRETRAIN = SLURM / "pretrain.sbatch"

# Name -> nodes of eight GPUs, sequence length, parameters in billions.
SCALES = {
    "llama-1.3b-32k": (1, 32_768, 1.3),
    "llama-7b-256k": (4, 262_144, 7.2),
    "llama-7b-1m": (16, 1_048_576, 7.2),
}
TOKEN_IDS = 32_000  # Llama 2's tokenizer
MANY_TOKEN_IDS = 128_256  # Llama 3's tokenizer
GIB = 2**30

FLOPS = 600e12  # operations per second of a GPU
NVLINK = 450e9  # bytes per second of a GPU within a node
NETWORK = 50e9  # bytes per second of a GPU between nodes, over its own network card
# Backward needs 1.2 times the tokens of forward to hide a hop: 3 times the bytes, 2.5 times the
# operations.
BACKWARD = 1.2


def setup_of(name: str) -> RunSettings:
    config = load_yaml(ROOT / "configs" / f"{name}.yaml")
    return RunSettings.resolve(config, config.parallel.world_size or 2)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_recipe_can_be_planned(name):
    setup = setup_of(name)
    assert f"{setup.grid.world_size} processes = " in plan(setup)


@pytest.mark.parametrize("name", SCALES)
def test_a_recipe_has_the_size_that_its_name_states(name):
    nodes, tokens, billions = SCALES[name]
    setup = setup_of(name)
    assert setup.config.parallel.world_size == 8 * nodes
    assert setup.config.data.seq_length == tokens
    assert round(parameter_count(setup.config.model, TOKEN_IDS, tokens) / 1e9, 1) == billions


@pytest.mark.parametrize("name", SCALES)
def test_a_recipe_leaves_a_fifth_of_80_gigabytes_unused(name):
    """The plan does not count everything, such as the caching allocator's fragmentation."""
    peak = max(stage.peak for stage in memory_of_stages(setup_of(name), MANY_TOKEN_IDS))
    assert peak < 0.8 * 80 * GIB


@pytest.mark.parametrize("name", SCALES)
def test_the_memory_stated_in_a_recipe_is_that_of_the_plan(name):
    comments = (ROOT / "configs" / f"{name}.yaml").read_text()
    stated = re.search(r"([\d.]+) GiB per GPU", comments)[1]
    [stage] = memory_of_stages(setup_of(name), TOKEN_IDS)
    assert f"{stage.peak / GIB:.1f}" == stated


@pytest.mark.parametrize("name", SCALES)
def test_the_hops_of_a_recipe_can_be_hidden(name):
    """The criterion of Ring Attention for a balanced layout.

    Tokens per rank must be at least 2 x key-value heads / heads x operations / bytes per second.
    """
    setup = setup_of(name)
    grid = setup.grid
    model = setup.config.model
    bandwidth = NVLINK if grid.context * grid.tensor <= 8 else NETWORK
    key_value_share = model.key_value_heads / model.num_attention_heads
    required = BACKWARD * 2 * key_value_share * FLOPS / bandwidth
    assert setup.layout.shard_length / grid.ulysses >= required


@pytest.mark.parametrize("name", SCALES)
def test_a_recipe_resumes_from_its_own_checkpoints(name):
    checkpoint = setup_of(name).config.checkpoint
    assert checkpoint.load == checkpoint.save != ""
    assert checkpoint.save_interval > 0


def sbatch_options(script: Path) -> dict[str, str]:
    """Return the options of the ``#SBATCH`` lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script.read_text(), re.M))


@pytest.mark.parametrize("name", SCALES)
def test_a_batch_script_differs_from_pretrain_in_job_nodes_signal_and_time_only(name):
    own = sbatch_options(SLURM / f"{name}.sbatch")
    general = sbatch_options(PRETRAIN)
    assert int(own["nodes"]) * int(own["ntasks-per-node"]) == setup_of(name).grid.world_size
    assert own["job-name"] == name
    assert own["signal"].startswith("B:USR1@")
    assert own.keys() == general.keys()
    different = {key for key in own if own[key] != general[key]}
    assert different <= {"job-name", "nodes", "signal", "time"}


SRUN = """\
#!/bin/sh
for argument; do echo "$argument"; done > arguments
"""


@pytest.mark.parametrize("name", SCALES)
def test_a_batch_script_starts_its_recipe_with_the_given_arguments(name, tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_JOB_ID": 1,
        "SLURM_JOB_USER": "me",
        "SLURM_CPUS_PER_TASK": 8,
    }
    job |= {"LOGS": tmp_path, "NODE_CACHE": tmp_path, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", SLURM / f"{name}.sbatch", "--data-path", "the store"]
    environment = os.environ | {key: str(value) for key, value in job.items()}
    subprocess.run(script, cwd=tmp_path, env=environment, check=True, timeout=60)
    program = ["python", f"{ROOT}/pretrain_gpt.py", "--config", f"{ROOT}/configs/{name}.yaml"]
    assert (tmp_path / "arguments").read_text().splitlines()[-6:] == [
        *program,
        "--data-path",
        "the store",
    ]
