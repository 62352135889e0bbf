"""A model, data and a run small enough to be repeated for every layout and ZeRO stage."""

from dataclasses import replace
from pathlib import Path

import deepspeed
import numpy as np
import torch

from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.store import Stored
from megatron_ring.config import (
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.data.document_boundaries import DocumentBoundaries
from megatron_ring.data.loader import build_loader
from megatron_ring.data.samples import SampleStream
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from megatron_ring.engine.deepspeed_groups import start_processes
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.environment import Environment
from megatron_ring.settings.precision import device_type
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training import checkpointing
from megatron_ring.training.assembly import build_model, start_engine
from megatron_ring.training.checkpoint_selection import select_checkpoint
from megatron_ring.training.schedule import learning_rate

VOCAB = 61
SEQ = 48
END_OF_DOCUMENT = 0


def config(**sections: dict) -> Config:
    """Return the config of a tiny two-layer Llama on CPU in fp32, with ``sections`` changed."""
    base = Config(
        model=ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2),
        parallel=ParallelConfig(context_parallel="striped"),
        data=DataConfig(seq_length=SEQ),
        training=TrainingConfig(
            train_iters=20,
            lr_warmup_iters=4,
            micro_batch_size=4,
            global_batch_size=4,
            dtype="fp32",
            lr=1e-2,
            clip_grad=0.5,
            eval_iters=2,
        ),
        logging=LoggingConfig(),
    )
    return replace(
        base,
        **{name: replace(getattr(base, name), **changes) for name, changes in sections.items()},
    )


def write_store(folder: Path) -> Path:
    """Write a store of forty documents of a language with regularities to learn."""
    generator = np.random.default_rng(0)
    with TokenStoreWriter(folder / "tiny", np.uint16) as writer:
        for length in generator.integers(20, 200, size=40):
            steps = generator.choice([1, 2, 5], size=length)
            writer.add_document((np.cumsum(steps) % VOCAB).astype(np.uint16))
    return folder / "tiny"


def write_short_documents(folder: Path) -> Path:
    """Write a store of that language in documents of 1 to 100 tokens, each with an end token."""
    generator = np.random.default_rng(0)
    with TokenStoreWriter(folder / "short", np.uint16) as writer:
        for length in (generator.pareto(1.0, size=200) * 8).astype(int).clip(0, 99):
            steps = generator.choice([1, 2, 5], size=length)
            writer.add_document([*(1 + np.cumsum(steps) % (VOCAB - 1)), END_OF_DOCUMENT])
    return folder / "short"


def stream(prefix: Path, seed: int = 1234, seq_length: int = SEQ) -> SampleStream:
    store = TokenStore(prefix)
    return SampleStream(store, range(len(store)), seq_length, seed, VOCAB)


def start_rank(global_rank: int, world_size: int) -> None:
    """Prepare this process for an engine, on the device that run_ranks has selected. Collective."""
    device = device_type()
    local_rank = torch.cuda.current_device() if device == "cuda" else global_rank
    start_processes(Environment(global_rank, local_rank, world_size, world_size, threads=1), device)
    # DeepSpeed keeps the tensor axis of an engine for the engines after it.
    deepspeed.utils.groups.mpu = None


class Run:
    """A tiny run on this rank. Collective: ``world_size`` ranks must build it together."""

    def __init__(self, config: Config, prefix: Path, global_rank: int, world_size: int):
        start_rank(global_rank, world_size)
        self.config = config
        self.setup = RunSettings.resolve(config, world_size)
        self.groups = ProcessGroups.build(self.setup.grid, global_rank)
        reduction = config.parallel.context_parallel_reduction
        attention = ContextParallelAttention(
            self.setup.layout, self.setup.kernel.name, self.groups, reduction=reduction
        )
        model = build_model(self.setup, self.groups, attention, VOCAB)
        self.engine = start_engine(model, self.setup, self.groups)
        self.consensus = Consensus.build()
        self.saver = checkpointing.Saver(self.setup, self.consensus)
        self.at = self.setup.grid.coordinates(global_rank)
        self.stream = stream(prefix, seq_length=config.data.seq_length)
        self.packing = DocumentBoundaries.from_config(config.data, END_OF_DOCUMENT)
        self.step = 0
        self._load_from(consumed_samples=0)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Return (loss, gradient norm) of the next ``count`` optimizer steps."""
        results = []
        for _ in range(count):
            self.step += 1
            result = self.engine.train_step(
                self.loader.next_step(), learning_rate(self.step, self.config.training)
            )
            results.append((result.loss, result.grad_norm))
        return results

    def state(self) -> RunState:
        return RunState(self.step, self.loader.consumed_samples, VOCAB, SEQ)

    def save(self) -> Path:
        """Write a checkpoint and return its folder once it is complete."""
        self.saver.save(self.engine, self.state())
        return self.saver.finish()

    def find(self) -> Stored | None:
        return select_checkpoint(self.setup, VOCAB, self.consensus)

    def resume(self, stored: Stored) -> None:
        checkpointing.resume(self.engine, stored, self.consensus)
        self.step = stored.state.step
        self._load_from(stored.state.consumed_samples)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return this rank's parts of the parameters, by their names in a whole GPT."""
        return dict(self.engine.named_parameters())

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return copies of ``named_parameters``; they are gathered under ZeRO 3."""
        parameters = self.named_parameters()
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def evaluate(self) -> float:
        """Return the loss summed over the next global batch, in nats."""
        return self.engine.evaluate([self.loader.next_step()], torch.ones(VOCAB)).loss_sum

    def _load_from(self, consumed_samples: int) -> None:
        self.loader = build_loader(
            self.stream,
            self.packing,
            self.setup.layout,
            self.setup.grid,
            self.at,
            self.config.training.micro_batch_size,
            self.setup.global_batch_size,
            consumed_samples,
            assigns_by_work=self.config.data.sample_assignment == "by-work",
        )
