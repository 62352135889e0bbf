"""All options of a run; every field of a section here is a YAML key and a command-line flag.

The text under a field is the option's help and its entry in the option reference. Defaults are
overridden by YAML (``--config``), and YAML by flags. Names are Megatron's where Megatron has the
option. Zero means "derived" only where the help text says so.

The sections check what they can check on their own (``problems``). Rules between sections, and
between options, processes and the device, are in settings/rules.py. No value is clamped or repaired
silently.
"""

from megatron_ring.config.data import DataConfig
from megatron_ring.config.evaluation import PositionsConfig
from megatron_ring.config.inference import GenerationConfig, InferenceConfig
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.needles import NeedlesConfig
from megatron_ring.config.operation import CheckpointConfig, GuardsConfig, LoggingConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.reading import load_yaml, parse, parse_flags, to_yaml
from megatron_ring.config.schema import Config
from megatron_ring.config.training import MemoryConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GenerationConfig",
    "GuardsConfig",
    "InferenceConfig",
    "LoggingConfig",
    "MemoryConfig",
    "ModelConfig",
    "NeedlesConfig",
    "ParallelConfig",
    "PositionsConfig",
    "TrainingConfig",
    "load_yaml",
    "parse",
    "parse_flags",
    "to_yaml",
]
