"""The whole config: its sections, and the options of the command itself."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

import tyro

from megatron_ring.config.checks import unusable_values
from megatron_ring.config.data import DataConfig
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.operation import CheckpointConfig, GuardsConfig, LoggingConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.training import MemoryConfig, TrainingConfig


def _parse_self_test(words: list[str]) -> str:
    """Parse --self-test; without a value it is "only"."""
    if len(words) > 1:
        raise ValueError("expected at most one of start, only, none")
    return words[0] if words else "only"


_SELF_TEST = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[{start,only,none}]",
    instance_from_str=_parse_self_test,
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
    choices=("start", "only", "none"),
)


@dataclass(frozen=True)
class Config:
    """Pretrain a GPT whose attention is split over the sequence by a ring."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    config: str = ""
    """YAML file with sections and keys; flags override it."""
    dry_run: bool = False
    """Print the resolved config and the plan, and exit without starting a run."""
    self_test: Annotated[Literal["start", "only", "none"], _SELF_TEST] = "start"
    """Self-test of the ranks: their neighbours are the expected ones, ring attention is exact, and
    links are timed. start: before training, if there are several ranks; only, or --self-test
    without a value: run the test and exit; none: skip it. Options, code and data are compared
    between ranks in any case."""

    def problems(self) -> list[str]:
        """Return all problems of the sections, each with the rule, a remedy and the flag."""
        if unusable := self.unusable_values():
            return unusable
        return [problem for section in self._sections() for problem in section.problems()]

    def unusable_values(self) -> list[str]:
        """Return the problems of values that no option can have (checks.py)."""
        return [problem for section in self._sections() for problem in unusable_values(section)]

    def _sections(self) -> list[Any]:
        values = [getattr(self, option.name) for option in fields(self)]
        return [value for value in values if is_dataclass(value)]
