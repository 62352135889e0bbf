"""A GPT in pipeline stages: its own layers, and what travels from stage to stage.

    (tokens, targets, positions, ...) -> StageEmbedding -> StageLayers, one a stage -> head -> loss sum

Stages hand on a tuple of tensors: the residual stream, its tokens' targets and positions and, where documents are kept
apart, where these begin, so that every stage turns, masks, passes its ring and at last judges what belongs to the very
micro-batch that it computes. Only the stream has a gradient. Who sends it, and when, is the engine's business (1F1B,
Narayanan et al. 2019, PipeDream).
"""

import torch

from megatron_ring.model.gpt import Layers, Vocabulary, loss_sum

Parcel = tuple[torch.Tensor, ...]
"""(x_BmE, targets_Bl, positions) or (x_BmE, targets_Bl, positions, document_starts): what one stage hands the next."""


class StageEmbedding(Vocabulary):
    """The first stage's beginning."""

    def forward(self, parcel: Parcel) -> Parcel:
        """``parcel`` has int64 tokens_Bl where later ones have x_BmE."""
        tokens_Bl, *rest = parcel
        return super().forward(tokens_Bl), *rest


class StageLayers(Layers):
    """The layers of one stage."""

    def forward(self, parcel: Parcel) -> Parcel:
        x_BmE, targets_Bl, positions_l, *starts = parcel
        # The mask is made on the host; a parcel arrives on the device.
        x_BmE = self.run(x_BmE, positions_l, starts[0].cpu() if starts else None)
        return x_BmE, targets_Bl, positions_l, *starts


class StageOutput(Vocabulary):
    """The last stage's end, where the head has weights of its own."""

    def forward(self, parcel: Parcel) -> torch.Tensor:
        return head(self, parcel)


def head(table: Vocabulary, parcel: Parcel) -> torch.Tensor:
    """The loss sum of a micro-batch; ``table`` is the embedding's copy where it is tied.

    A loss function of DeepSpeed's would be outside of the module, and what it adds to a weight's gradient is cleared
    in bfloat16 without ZeRO, when the module's own backward begins.
    """
    x_BmE, targets_Bl, *_ = parcel
    return loss_sum(x_BmE, table.weight, targets_Bl, table.execution)
