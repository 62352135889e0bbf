"""Greedy tokens and the logits of every step equal those of transformers' ``generate``."""

from pathlib import Path

import pytest
import torch
import transformers

from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from tests.checkpoint.hugging_face_models import CASES, VOCABULARY, save
from tests.distributed import run_ranks
from tests.inference.greedy import GRIDS, Generated, on_real_ranks

FAMILIES = ["llama", "mistral", "qwen2", "qwen3 with full layers between", "gpt2"]
NEW_TOKENS = 8
LENGTHS = [1, 2, 9, 13]  # one token, less than a ring, odd, prime


def prompt(tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(VOCABULARY, (tokens,), generator=generator).tolist()


PROMPTS = [prompt(tokens) for tokens in LENGTHS]
# All of them at once, and a prompt by itself.
BATCHES = [PROMPTS, PROMPTS[1:2]]


@torch.no_grad()
def generated_by_transformers(folder: Path) -> Generated:
    """Continue every prompt by itself, without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()
    model.generation_config.eos_token_id = None
    tokens, logits = [], []
    for prompt_S in PROMPTS:
        generated = model.generate(
            torch.tensor([prompt_S]),
            attention_mask=torch.ones(1, len(prompt_S), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(generated.sequences[0, len(prompt_S) :])
        logits.append(torch.cat(generated.logits))
    return Generated(torch.stack(tokens), torch.stack(logits))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder of transformers and our checkpoint, ``ours``, inside of it, by family."""
    folders = {name: tmp_path_factory.mktemp("model") for name in FAMILIES}
    for name, folder in folders.items():
        import_folder(save(CASES[name], folder), folder / "ours", Stretch())
    return folders


@pytest.fixture(scope="module")
def expected(checkpoints) -> dict[str, Generated]:
    return {name: generated_by_transformers(folder) for name, folder in checkpoints.items()}


@pytest.fixture(scope="module")
def results(checkpoints) -> dict[int, list[dict]]:
    """The results of every rank, by world size."""
    ours = {name: next((folder / "ours").glob("*step*")) for name, folder in checkpoints.items()}
    arguments = ours, BATCHES, NEW_TOKENS
    return {
        world_size: run_ranks(world_size, on_real_ranks, *arguments)
        if world_size > 1
        else [on_real_ranks(0, 1, *arguments)]
        for world_size in GRIDS
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "grid",
    [grid for grids in GRIDS.values() for grid in grids],
    ids=lambda g: f"{g.ring}x{g.tensor}",
)
def test_greedy_tokens_and_logits_equal_those_of_transformers(grid, family, results, expected):
    for of_rank in results[grid.world_size]:
        for number, rows in enumerate([slice(None), slice(1, 2)]):
            found = of_rank[grid, family, number]
            assert torch.equal(found.tokens_BT, expected[family].tokens_BT[rows])
            torch.testing.assert_close(
                found.logits_BTV, expected[family].logits_BTV[rows], rtol=1e-5, atol=1e-5
            )


def test_greedy_continuations_differ_between_prompts(expected):
    """Otherwise equal tokens would show little."""
    for generated in expected.values():
        assert len(set(map(tuple, generated.tokens_BT.tolist()))) > 1
