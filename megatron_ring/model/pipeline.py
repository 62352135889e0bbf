"""A GPT in pipeline stages: its own layers, and what travels from stage to stage.

    (tokens, positions, ...) -> Vocabulary -> StageLayers, one a stage -> head -> (hidden, weight) -> loss

Stages hand on a tuple of tensors: the residual stream, the positions of its tokens and, where documents are kept
apart, where these begin, so that every stage turns, masks and passes its ring what belongs to the very micro-batch
that it computes. Only the stream has a gradient. Who sends it, and when, is the engine's business (1F1B, Narayanan et
al. 2019, PipeDream).
"""

import torch

from megatron_ring.model.execution import Execution
from megatron_ring.model.gpt import Layers, Vocabulary, loss_sum

Parcel = tuple[torch.Tensor, ...]
"""(x_BmE, positions) or (x_BmE, positions, document_starts): what one stage hands the next."""


class StageLayers(Layers):
    """The layers of one stage."""

    def forward(self, parcel: Parcel) -> Parcel:
        x_BmE, positions_l, *starts = parcel
        # The mask is made on the host; a parcel arrives on the device.
        return self.run(x_BmE, positions_l, starts[0].cpu() if starts else None), positions_l, *starts


def embed(table: Vocabulary, parcel: Parcel) -> Parcel:
    """The first stage's beginning: ``parcel`` has int64 tokens_Bl where later ones have x_BmE."""
    tokens_Bl, *rest = parcel
    return table(tokens_Bl), *rest


def head(table: Vocabulary, parcel: Parcel) -> tuple[torch.Tensor, torch.Tensor]:
    """The last stage's end: what the loss is computed from."""
    return parcel[0], table.weight


def scaled_loss(
    outputs: tuple[torch.Tensor, torch.Tensor], labels: tuple[torch.Tensor, torch.Tensor], execution: Execution
) -> torch.Tensor:
    """A micro-batch's loss sum times the scale that comes with its targets: ``labels`` is (targets_Bl, scale)."""
    (hidden_BmE, weight_vE), (targets_Bl, scale) = outputs, labels
    return loss_sum(hidden_BmE, weight_vE, targets_Bl, execution) * scale
