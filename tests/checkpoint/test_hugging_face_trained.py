"""A model is imported, trained for a step on 2 pipeline x 2 tensor ranks, and exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.hugging_face.exporting import ExportOptions, export_checkpoint
from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.config import Config, load_yaml
from tests.checkpoint.hugging_face_models import (
    CASES,
    LENGTH,
    VOCABULARY,
    logits,
    our_logits,
    save,
    tensors,
)
from tests.distributed import run_ranks
from tests.training import tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
GRID = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def config_of(folder: Path) -> Config:
    """Return the model and data options of the import with the training options of tiny runs."""
    written = load_yaml(folder / "step-00000000/config.yaml")
    trained = tiny.config(parallel=GRID, checkpoint={"load": str(folder), "save": str(folder)})
    return replace(trained, model=written.model, data=written.data)


def train_a_step(rank: int, world_size: int, folders: list[Path], prefix: Path) -> None:
    """Train the model in each folder for a step and save it to the same folder."""
    for folder in folders:
        run = tiny.Run(config_of(folder), prefix, rank, world_size)
        run.resume(run.find())
        run.steps(1)
        run.save()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder with, for each family, theirs, ours after step 1, and the export of that."""
    assert (tiny.VOCAB, tiny.SEQ) == (VOCABULARY, LENGTH)
    root = tmp_path_factory.mktemp("trained")
    for family in FAMILIES:
        import_folder(
            save(CASES[family], root / family / "theirs"),
            root / family / "ours",
            Stretch(),
        )
    run_ranks(
        4, train_a_step, [root / family / "ours" for family in FAMILIES], tiny.write_store(root)
    )
    for family in FAMILIES:
        export_checkpoint(
            root / family / "ours",
            root / family / "back",
            ExportOptions(family=family, max_shard_size="20KB"),
        )
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_logits_of_the_trained_model(family, trained):
    tokens_BS = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    checkpoint = Summary.of(trained / family / "ours/step-00000001")
    exported = logits(trained / family / "back", tokens_BS)
    torch.testing.assert_close(exported, our_logits(checkpoint, tokens_BS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(exported, logits(trained / family / "theirs", tokens_BS), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_has_changed_every_tensor(family, trained):
    before = tensors(trained / family / "theirs")
    after = tensors(trained / family / "back")
    assert after.keys() == before.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
