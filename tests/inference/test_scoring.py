"""Log-likelihoods of tokens over the ring equal those of a whole model in one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.inference.loading import load
from megatron_ring.inference.scoring import token_log_likelihoods
from tests.distributed import run_ranks
from tests.inference import models
from tests.model.conftest import plain_attention

MODELS = {
    "llama": models.LLAMA,
    "gpt2": models.GPT2,
    "window": replace(models.LLAMA, window_size=7),
}
# Of one token and of none, shorter than a ring, and as long as the model's positions allow.
LENGTHS = (17, 1, 2, 0, 49, 5, 3, 48, 31, 4)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(models.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        models.write_checkpoint(folder / name, models.random_model(config), config)
    return folder


def expected(name: str, sequence: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores by a model that is not split, in float64."""
    if len(sequence) < 2:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    model = models.random_model(MODELS[name]).double()
    for block in model.blocks.values():
        block.attention.attention = plain_attention
    tokens = torch.tensor(sequence)
    with torch.no_grad():
        logits_SV = model(tokens[None, :-1], torch.arange(len(sequence) - 1))[0]
    scores = logits_SV.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return scores, logits_SV.argmax(-1) == tokens[1:]


def greedy_sequence(name: str) -> list[int]:
    """A sequence whose last tokens are the likeliest ones."""
    sequence = sequences()[0][:9]
    model = models.random_model(MODELS[name]).double()
    for block in model.blocks.values():
        block.attention.attention = plain_attention
    for _ in range(4):
        logits_1SV = model(torch.tensor([sequence]), torch.arange(len(sequence)))
        sequence.append(int(logits_1SV[0, -1].argmax()))
    return sequence


def scored_by_rank(rank: int, world_size: int, folder: Path) -> dict:
    environment = models.environment(rank, world_size)
    splits = {
        "striped": {},
        "wide stripes": {"stripe_size": 3},
        "zigzag": {"context_parallel": "zigzag"},
        "tensor 2": {"tensor_model_parallel_size": 2},
    }
    found = {}
    for name in MODELS:
        given = [*sequences(), greedy_sequence(name)]
        for split, changes in splits.items():
            loaded = load(models.options(folder / name, **changes), environment)
            done = []
            found[name, split] = token_log_likelihoods(
                loaded, given, lambda *counts, done=done: done.append(counts)
            )
            assert done[-1] == (len(given), len(given))
            assert len(done) > 1, "there should be several packs"
    for sequence in (list(range(50)), [1, models.VOCABULARY], [-1, 1]):
        with pytest.raises(ConfigError) as error:
            token_log_likelihoods(loaded, [sequence])
        found[len(sequence), sequence[0]] = str(error.value)
    loaded.model.final_norm.weight.fill_(torch.inf)  # as where activations overflow
    with pytest.raises(ConfigError, match="nan or infinite.*--dtype"):
        token_log_likelihoods(loaded, sequences())
    return found


def test_scores_equal_those_of_the_whole_model_on_every_rank(folder):
    by_rank = run_ranks(4, scored_by_rank, folder)
    for name in MODELS:
        given = [*sequences(), greedy_sequence(name)]
        for found in by_rank:
            for split in ("striped", "wide stripes", "zigzag", "tensor 2"):
                for sequence, scores in zip(given, found[name, split], strict=True):
                    log_likelihood, is_greedy = expected(name, sequence)
                    torch.testing.assert_close(
                        scores.log_likelihood.double(), log_likelihood, rtol=1e-5, atol=1e-5
                    )
                    assert torch.equal(scores.is_greedy, is_greedy)
                assert scores.is_greedy[-4:].all()
    refused = by_rank[0]
    for text in ("50 tokens", "has 48", "at most 49", "--seq-length"):
        assert text in refused[50, 0]
    for key, text in (((2, 1), "token id 61"), ((2, -1), "token id -1")):
        assert text in refused[key]
        assert "0 to 60" in refused[key]
