"""Greedy decoding of checkpoints on real ranks, which need not import transformers."""

from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ring.checkpoint.summary import Summary
from megatron_ring.inference.model import InferenceModel
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.tensor import split_of
from megatron_ring.parallel.tensor_exchange import TensorParallel

GRIDS = {
    1: [Grid()],
    2: [Grid(ring=2)],
    3: [Grid(ring=3)],
    4: [Grid(ring=4), Grid(ring=2, tensor=2)],
}


class Generated(NamedTuple):
    """tokens_BT: the greedy continuation of each prompt; logits_BTV: what it was chosen from."""

    tokens_BT: torch.Tensor
    logits_BTV: torch.Tensor


def load(path: Path, tensor: TensorParallel) -> GPT:
    """Build the model of a checkpoint, with this tensor rank's part of every parameter."""
    checkpoint = Summary.of(path)
    state = checkpoint.state
    model = GPT(
        checkpoint.config.model, state.vocab_size, state.seq_length, None, tensor, seed=1
    ).requires_grad_(False)
    for name, parameter in model.named_parameters():
        whole = checkpoint.tensors.read(name)
        if split := split_of(parameter):
            whole = whole.narrow(split.dim, split.indices.start, len(split.indices))
        parameter.copy_(whole)
    return model.eval()


def generate(
    path: Path, prompts: list[list[int]], new_tokens: int, groups: ProcessGroups
) -> Generated:
    gpt = load(path, TensorParallel.of(groups.tensor, sequence_parallel=False))
    model = InferenceModel(gpt, groups, kernel="sdpa")
    cache = model.new_cache(len(prompts), [len(prompt) + new_tokens for prompt in prompts])
    logits = [model.prefill(prompts, cache)]
    tokens = [logits[0].argmax(-1)]
    for _ in range(new_tokens - 1):
        logits.append(model.decode(tokens[-1].tolist(), cache))
        tokens.append(logits[-1].argmax(-1))
    return Generated(torch.stack(tokens, 1), torch.stack(logits, 1))


def on_real_ranks(
    rank: int,
    world_size: int,
    paths: dict[str, Path],
    batches: list[list[list[int]]],
    new_tokens: int,
) -> dict[tuple[Grid, str, int], Generated]:
    """Return the result of this rank for every grid, checkpoint and batch of prompts."""
    results = {}
    for grid in GRIDS[world_size]:
        groups = ProcessGroups.build(grid, rank)
        for name, path in paths.items():
            for number, prompts in enumerate(batches):
                results[grid, name, number] = generate(path, prompts, new_tokens, groups)
    return results
