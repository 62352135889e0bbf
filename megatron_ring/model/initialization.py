"""Initial weights: a function of the seed and a parameter's full name, never of the grid or of what was drawn before.

Every parameter is drawn whole, in float32 on the CPU, by a generator of its own. A rank that keeps some rows, or some
layers, keeps the numbers that one process would have had there.

Matrices are normal(0, init_method_std). The two projections of a block that write into the residual stream get
1 / sqrt(2 x num_layers) of that, so that the stream does not grow with depth (Radford et al. 2019, GPT-2, section 2.3).
Norms start as the identity, biases at zero. So do the scores of sinks, which is the off-by-one softmax; Megatron and
transformers' gpt-oss draw them from that normal, but heads need no chance to tell them apart.
"""

import hashlib

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.parallel.tensor import split_of, whole_shape

RESIDUAL_PROJECTIONS = ("attention.out_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill every parameter in place. ``prefix`` and a parameter's name in ``module`` make its name in a whole GPT."""
    for name, parameter in module.named_parameters(prefix):
        whole, split = (
            initial_weight(name, whole_shape(parameter), config, seed),
            split_of(parameter),
        )
        own = whole.narrow(split.dim, split.indices.start, len(split.indices)) if split else whole
        parameter.copy_(own)


def initial_weight(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: int
) -> torch.Tensor:
    """The parameter of full name ``name`` and full size ``shape``, float32 on the CPU.

    Names are those of a whole GPT, ``blocks.3.mlp.up_proj.weight`` for example, whatever part of it the caller holds.
    """
    if name.endswith((".bias", ".sink_H")):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    residual = name.endswith(RESIDUAL_PROJECTIONS)
    deviation = (
        config.init_method_std / (2 * config.num_layers) ** 0.5
        if residual
        else config.init_method_std
    )
    return torch.randn(shape, generator=_generator(name, seed)) * deviation


def _generator(name: str, seed: int) -> torch.Generator:
    """Seeded with 32 bits, all that torch's CPU generator reads, and by sha256, since ``hash`` differs per process."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
