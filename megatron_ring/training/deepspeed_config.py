"""DeepSpeed's own config: what follows from our options, and the user's extras where they do not contradict it."""

from typing import Any

from megatron_ring.config import Config
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.grid import Grid

# Which of our flags a derived key of DeepSpeed's config follows from.
_DERIVED_FROM = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--dtype",
    "fp16.enabled": "--dtype",
    "tensorboard.enabled": "--tensorboard-dir",
    "wandb.enabled": "--wandb-project",
    "csv_monitor.enabled": "--csv-dir",
}


def derive(config: Config, grid: Grid, micro_batches: int, dtype: str) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``; raises ConfigError for extras that contradict what is derived.

    DeepSpeed sees context ranks as data ranks, so its batch sizes count a sequence once for each of its shards.
    """
    training, logging = config.training, config.logging
    derived = {
        "train_batch_size": training.micro_batch_size * micro_batches * grid.data_context,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": training.clip_grad,
        "zero_optimization": {"stage": training.zero_stage},
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        # Sums over ranks in fp32 whatever the compute type: bf16 loses mass as the ring grows.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "tensorboard": {"enabled": bool(logging.tensorboard_dir), "output_path": logging.tensorboard_dir},
        "wandb": {"enabled": bool(logging.wandb_project), "project": logging.wandb_project},
        "csv_monitor": {"enabled": bool(logging.csv_dir), "output_path": logging.csv_dir},
    }
    problems: list[str] = []
    merged = _merged(derived, training.deepspeed, "", problems)
    if problems:
        raise ConfigError(problems)
    return merged


def _merged(derived: dict[str, Any], extra: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        name = f"{path}{key}"
        if isinstance(derived.get(key), dict) and isinstance(value, dict):
            merged[key] = _merged(derived[key], value, f"{name}.", problems)
        elif key in derived and derived[key] != value:
            flag = _DERIVED_FROM.get(name)
            remedy = f"Set {flag} instead." if flag else "It is fixed."
            problems.append(f"deepspeed: {name} {value!r} contradicts the derived {derived[key]!r}. {remedy}")
        else:
            merged[key] = value
    return merged
