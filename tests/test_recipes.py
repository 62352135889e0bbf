"""Every file of configs/ can be planned; each scale of GPUs has a recipe that fits them, and its batch script."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_ring.config import load_yaml
from megatron_ring.plan.memory_report import memory_of_stages
from megatron_ring.plan.parameters import parameter_count
from megatron_ring.settings.setup import Setup
from megatron_ring.training.console import plan

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "tools" / "slurm"
PRETRAIN = SLURM / "pretrain.sbatch"

# Name: nodes of eight GPUs, tokens of a sample, parameters in billions.
SCALES = {
    "llama-1.3b-32k": (1, 32_768, 1.3),
    "llama-7b-256k": (4, 262_144, 7.2),
    "llama-7b-1m": (16, 1_048_576, 7.2),
}
TOKEN_IDS = 32_000  # of Llama 2's tokenizer
MANY_TOKEN_IDS = 128_256  # of Llama 3's
GIB = 2**30

# A GPU's operations a second, and what it sends: over NVLink within a node, over its own card between nodes.
COMPUTES, NVLINK, NETWORK = 600e12, 450e9, 50e9
BACKWARD = 1.2  # as hard to hide as forward: 3 times the bytes, 2.5 times the work


def setup_of(name: str) -> Setup:
    config = load_yaml(ROOT / "configs" / f"{name}.yaml")
    return Setup.of(config, config.parallel.world_size or 2)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_recipe_is_a_config_that_can_be_planned(name):
    setup = setup_of(name)
    assert f"{setup.grid.world_size} processes = " in plan(setup)


@pytest.mark.parametrize("name", SCALES)
def test_a_recipe_is_of_the_scale_that_its_name_says(name):
    nodes, tokens, billions = SCALES[name]
    setup = setup_of(name)
    assert setup.config.parallel.world_size == 8 * nodes
    assert setup.config.data.seq_length == tokens
    assert round(parameter_count(setup.config.model, TOKEN_IDS, tokens) / 1e9, 1) == billions


@pytest.mark.parametrize("name", SCALES)
def test_a_recipe_leaves_a_fifth_of_80_gigabytes_to_what_is_not_counted(name):
    assert (
        max(stage.peak for stage in memory_of_stages(setup_of(name), MANY_TOKEN_IDS))
        < 0.8 * 80 * GIB
    )


@pytest.mark.parametrize("name", SCALES)
def test_the_memory_that_a_recipe_tells_of_is_what_is_counted(name):
    told = re.search(r"counts ([\d.]+) GiB a GPU", (ROOT / "configs" / f"{name}.yaml").read_text())
    (stage,) = memory_of_stages(setup_of(name), TOKEN_IDS)
    assert f"{stage.peak / GIB:.1f}" == told[1]


@pytest.mark.parametrize("name", SCALES)
def test_the_hops_of_a_recipe_can_be_hidden(name):
    """Ring Attention's criterion, of a balanced layout: 2 x key-value heads / heads x operations / bytes, in tokens."""
    setup = setup_of(name)
    grid, model = setup.grid, setup.config.model
    link = NVLINK if grid.context * grid.tensor <= 8 else NETWORK
    share = (model.num_query_groups or model.num_attention_heads) / model.num_attention_heads
    assert setup.layout.shard_length / grid.ulysses >= BACKWARD * 2 * share * COMPUTES / link


@pytest.mark.parametrize("name", SCALES)
def test_a_recipe_goes_on_where_it_saved(name):
    checkpoint = setup_of(name).config.checkpoint
    assert checkpoint.load == checkpoint.save != ""
    assert checkpoint.save_interval > 0


def asked_of_slurm(script: Path) -> dict[str, str]:
    """``#SBATCH`` lines as a dict."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script.read_text(), re.M))


@pytest.mark.parametrize("name", SCALES)
def test_a_batch_script_asks_for_the_nodes_of_its_recipe_and_else_for_what_pretrain_does(name):
    own, general = asked_of_slurm(SLURM / f"{name}.sbatch"), asked_of_slurm(PRETRAIN)
    assert int(own["nodes"]) * int(own["ntasks-per-node"]) == setup_of(name).grid.world_size
    assert own["job-name"] == name
    assert own["signal"].startswith("B:USR1@")
    assert own.keys() == general.keys()
    assert {key for key in own if own[key] != general[key]} <= {
        "job-name",
        "nodes",
        "signal",
        "time",
    }


SRUN = """\
#!/bin/sh
for argument; do echo "$argument"; done > arguments
"""


@pytest.mark.parametrize("name", SCALES)
def test_a_batch_script_starts_its_recipe_with_what_else_is_asked(name, tmp_path):
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
