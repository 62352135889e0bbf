"""Loads a trained model for inference: a checkpoint of any grid, or a Hugging Face folder.

``open_model`` reads everything but the weights and checks that the model can run on these
processes; ``OpenedModel.load`` then allocates this tensor rank's part of each parameter, and reads
that part only. ``load`` does both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from megatron_ring.checkpoint import boxes, store
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.checkpoint.finite import NonFiniteTensor, count_non_finite, describe_non_finite
from megatron_ring.checkpoint.hugging_face.importing import Source
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from megatron_ring.checkpoint.selection import with_checkpoint_error
from megatron_ring.checkpoint.tensors import WEIGHT, Tensors
from megatron_ring.config import InferenceConfig, ModelConfig
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.inference.inference_settings import resolve_settings, sequence_positions
from megatron_ring.inference.model_location import find_model
from megatron_ring.inference.model_tokenizer import (
    ModelTokenizer,
    TokenizerSources,
    find_tokenizer,
    store_notes,
)
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import materialize
from megatron_ring.model.shapes import parameter_shapes
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus, run_checked
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.rendezvous import TIMEOUT, join_processes
from megatron_ring.parallel.tensor import part_shape, split_of
from megatron_ring.parallel.tensor_exchange import TensorParallel
from megatron_ring.settings.precision import device_type
from megatron_ring.settings.run_settings import RunSettings


@dataclass(frozen=True)
class Loaded:
    """A model on this rank, and what it needs to run; every rank has the same but its weights.

    Attributes:
        model: in evaluation mode and without gradients. Its layers have no attention function yet:
            set ``block.attention.attention`` of each.
        vocab_size: V, the rows of the embedding over all tensor ranks.
        seq_length: positions that a sequence may have.
        tokenizer: None if none was found; ``text.required()`` raises the error.
        text: the tokenizer with the ids that begin and end a text.
        groups: None for each group of one rank. The grid has ring and tensor ranks only.
        kernel: a key of ``KERNELS``.
        layout_name, stripe_size: of a sequence over the ring.
        consensus: collectives of Python objects over all ranks.
        source: the checkpoint or folder that the weights are from.
    """

    model: GPT
    model_config: ModelConfig
    vocab_size: int
    seq_length: int
    tokenizer: Tokenizer | None
    text: ModelTokenizer
    grid: Grid
    groups: ProcessGroups
    device: torch.device
    dtype: torch.dtype
    kernel: str
    layout_name: str
    stripe_size: int
    consensus: Consensus
    source: Path


class Weights(Protocol):
    """Where the weights of a model are read from."""

    def read_into(self, parameters: dict[str, tuple[Box, torch.Tensor]]) -> None:
        """Fill each tensor with its box of the parameter of that name."""


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights have not been read, resolved for a number of processes.

    Attributes:
        source: the checkpoint or Hugging Face folder.
        notes: sentences on why this checkpoint was chosen, and on a store that has changed.
        settings: grid, dtype, attention kernel and fused operations.
        trained_length: the positions that the model was trained on or stretched to.
        seq_length: the positions that a sequence may have now.
    """

    source: Path
    notes: tuple[str, ...]
    settings: RunSettings
    vocab_size: int
    trained_length: int
    seq_length: int
    text: ModelTokenizer
    weights: Weights

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.settings.config.model

    def load(self, environment: Environment, consensus: Consensus) -> Loaded:
        """Allocate this rank's part of the model and read its weights. Collective; blocks.

        Raises CheckpointError on every rank if one cannot read its part, or finds a value in it
        that is nan or infinite.
        """
        settings = self.settings
        groups = ProcessGroups.build(settings.grid, environment.global_rank)
        device = torch.device(settings.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        tensor = TensorParallel.of(groups.tensor, sequence_parallel=False)
        with torch.device("meta"):
            model = GPT(
                self.model_config,
                self.vocab_size,
                self.trained_length,  # from which the default of RoPE scaling is derived
                None,
                tensor,
                settings.operations.operations,
            )
        materialize(model, device, settings.precision.dtype)
        model.eval().requires_grad_(False)
        failed = f"the weights in {self.source} cannot be read"
        run_checked(consensus, with_checkpoint_error(failed, lambda: self._read_weights(model)))
        return Loaded(
            model=model,
            model_config=self.model_config,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
            tokenizer=self.text.tokenizer,
            text=self.text,
            grid=settings.grid,
            groups=groups,
            device=device,
            dtype=settings.precision.dtype,
            kernel=settings.kernel.name,
            layout_name=settings.layout.name,
            stripe_size=settings.layout.stripe_size,
            consensus=consensus,
            source=self.source,
        )

    def _read_weights(self, model: GPT) -> None:
        parameters = dict(model.named_parameters())
        self.weights.read_into(
            {name: (_own_box(parameter), parameter.data) for name, parameter in parameters.items()}
        )
        counts = {name: count_non_finite(values) for name, values in parameters.items()}
        if non_finite := {name: count for name, count in counts.items() if count}:
            raise NonFiniteTensor(
                describe_non_finite(name, count) for name, count in sorted(non_finite.items())
            )


def _own_box(parameter: nn.Parameter) -> Box:
    """Return which part of the whole parameter this tensor rank holds."""
    box = [range(size) for size in part_shape(parameter)]
    if split := split_of(parameter):
        box[split.dim] = split.indices
    return tuple(box)


def load(config: InferenceConfig, environment: Environment) -> Loaded:
    """Join the processes and load the model. Collective over all processes; blocks.

    Raises ConfigError, CheckpointError, DataError or KernelUnavailable on every rank, as
    ``open_model`` and ``OpenedModel.load`` do.
    """
    join_processes(environment, device_type(), TIMEOUT)
    consensus = Consensus.build()
    return open_model(config, environment.world_size, consensus).load(environment, consensus)


def open_model(
    config: InferenceConfig, world_size: int, consensus: Consensus | None = None
) -> OpenedModel:
    """Find the model and its tokenizer, and resolve the options for ``world_size`` processes.

    With ``consensus`` it is collective and blocks: rank 0 decides which checkpoint is used, and the
    ranks verify its files together. Without, nothing is verified, as for --dry-run. Raises, on
    every rank, ConfigError for illegal options and a tokenizer that does not fit, CheckpointError
    if there is no model to use, DataError for a damaged tokenizer, KernelUnavailable.
    """
    if problems := config.problems():
        raise ConfigError(problems)
    path, stored_notes = find_model(config.load, consensus)

    def open_found() -> OpenedModel:
        if (path / store.STATE).is_file():
            return _open_checkpoint(config, world_size, path, stored_notes)
        return _open_hugging_face(config, world_size, path)

    act = with_checkpoint_error(f"{path} cannot be read", open_found)
    return run_checked(consensus, act) if consensus else act()


# ---- checkpoints of this project ----


@dataclass(frozen=True)
class _CheckpointWeights:
    tensors: Tensors

    def read_into(self, parameters: dict[str, tuple[Box, torch.Tensor]]) -> None:
        for name, (box, out) in parameters.items():
            self.tensors.read_into(out, name, WEIGHT, box)


def _open_checkpoint(
    config: InferenceConfig, world_size: int, path: Path, notes: tuple[str, ...]
) -> OpenedModel:
    state, _ = _described(path)
    run = store.read_config(path)
    tensors = Tensors.open(path)
    if WEIGHT not in tensors.kinds:
        raise CheckpointError(
            f"{path} has no weights, only {', '.join(tensors.kinds) or 'an empty index'}. Set "
            "--load to another checkpoint."
        )
    tensors.check_shapes(parameter_shapes(run.model, state.vocab_size, state.seq_length))
    sources = TokenizerSources.of_checkpoint(path, run, state.end_of_document)
    is_exact = run.model.padded_vocab_size == 0
    return OpenedModel(
        source=path,
        notes=notes + store_notes(config, sources, state.data),
        settings=resolve_settings(config, run.model, state.seq_length, world_size),
        vocab_size=state.vocab_size,
        trained_length=state.seq_length,
        seq_length=sequence_positions(config, run.model, state.seq_length),
        text=find_tokenizer(config, sources, state.vocab_size, is_exact),
        weights=_CheckpointWeights(tensors),
    )


def _described(path: Path) -> tuple[store.RunState, dict[str, store.FileRecord]]:
    try:
        return store.described(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not complete: {error}. Set --load to another.") from error


# ---- Hugging Face folders ----


@dataclass(frozen=True)
class _HuggingFaceWeights:
    source: Source

    def read_into(self, parameters: dict[str, tuple[Box, torch.Tensor]]) -> None:
        for name, whole in self.source.parameters():
            box, out = parameters[name]
            out.copy_(whole[boxes.slices(box)])


def _open_hugging_face(config: InferenceConfig, world_size: int, path: Path) -> OpenedModel:
    source = Source.open(path, Stretch())
    model = source.config.model
    length = source.config.data.seq_length
    sources = TokenizerSources(hugging_face=path)
    return OpenedModel(
        source=path,
        notes=(),
        settings=resolve_settings(config, model, length, world_size),
        vocab_size=source.vocab_size,
        trained_length=length,
        seq_length=sequence_positions(config, model, length),
        text=find_tokenizer(config, sources, source.vocab_size, exact=False),
        weights=_HuggingFaceWeights(source),
    )
