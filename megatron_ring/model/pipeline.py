"""A GPT in pipeline stages: its own layers, and what travels from stage to stage.

    (tokens, positions, ...) -> StageEmbedding -> StageLayers, one a stage -> head -> (hidden, weight) -> loss

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


class StageEmbedding(Vocabulary):
    """The first stage's beginning."""

    def forward(self, parcel: Parcel) -> Parcel:
        """``parcel`` has int64 tokens_Bl where later ones have x_BmE."""
        tokens_Bl, *rest = parcel
        return super().forward(tokens_Bl), *rest


class StageOutput(Vocabulary):
    """The last stage's end, where the head has weights of its own."""

    def forward(self, parcel: Parcel) -> tuple[torch.Tensor, torch.Tensor]:
        return head(self, parcel)


def head(table: Vocabulary, parcel: Parcel) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss is computed from: hidden_BmE and the matrix weight_vE, the embedding's copy where it is tied."""
    return parcel[0], table.weight


def scaled_loss(
    outputs: tuple[torch.Tensor, torch.Tensor], labels: tuple[torch.Tensor, torch.Tensor], execution: Execution
) -> torch.Tensor:
    """A micro-batch's loss sum times the scale that comes with its targets: ``labels`` is (targets_Bl, scale)."""
    (hidden_BmE, weight_vE), (targets_Bl, scale) = outputs, labels
    return loss_sum(hidden_BmE, weight_vE, targets_Bl, execution) * scale
