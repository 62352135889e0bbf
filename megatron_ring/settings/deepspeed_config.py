"""DeepSpeed's own config: what follows from our options, and the user's extras where they do not contradict it."""

from typing import Any

from megatron_ring.config import Config, MemoryConfig
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.grid import Grid

# Keys of DeepSpeed's config that our own flags settle, whether they are derived or left out. Without a flag: fixed.
_SETTLED_BY = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "elasticity": "--global-batch-size",
    "gradient_clipping": "--clip-grad",
    "optimizer": "--lr, --weight-decay, --adam-beta1, --adam-beta2 or --adam-eps",
    "scheduler": "--lr, --min-lr, --lr-warmup-iters or --lr-decay-style",
    "zero_optimization.stage": "--zero-stage",
    "zero_optimization.offload_optimizer": "--offload-optimizer",
    "zero_optimization.offload_optimizer.device": "--offload-optimizer",
    "zero_optimization.offload_param": "--offload-param",
    "zero_optimization.offload_param.device": "--offload-param",
    "bf16.enabled": "--dtype",
    "fp16.enabled": "--dtype",
    "amp": "--dtype",
    "torch_autocast": "--dtype",
    "tensor_parallel": "--tensor-model-parallel-size",
    "sequence_parallel_size": "--context-parallel-size or --ulysses-degree",
    "pipeline.stages": "--pipeline-model-parallel-size",
    "pipeline.activation_checkpoint_interval": "--recompute",
    "activation_checkpointing": "--recompute or --offload-activations",
    "curriculum_learning": "--seq-length",
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
        "zero_optimization": {"stage": training.zero_stage, **_offload(config.memory)},
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        # Sums over ranks in fp32 whatever the compute type: bf16 loses mass as the ring grows.
        "communication_data_type": "fp32",
        # DeepSpeed would cut what travels between stages into tensor ranks' parts, as though all of them held the same;
        # under sequence_parallel they hold parts already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # The optimizer is torch's AdamW, offloaded or not.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The loss is scaled for a mean over ranks and micro-batches (loss.py).
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "tensorboard": {
            "enabled": bool(logging.tensorboard_dir),
            "output_path": logging.tensorboard_dir,
        },
        "wandb": {"enabled": bool(logging.wandb_project), "project": logging.wandb_project},
        "csv_monitor": {"enabled": bool(logging.csv_dir), "output_path": logging.csv_dir},
    }
    problems: list[str] = []
    merged = _merged(derived, training.deepspeed, "", problems)
    if problems:
        raise ConfigError(problems)
    return merged


def _offload(memory: MemoryConfig) -> dict[str, Any]:
    """What ZeRO keeps in CPU memory; pinned, which DeepSpeed does of itself where there is something to pin for."""
    kept = {"offload_optimizer": memory.offload_optimizer, "offload_param": memory.offload_param}
    return {key: {"device": place} for key, place in kept.items() if place != "none"}


def _merged(
    derived: dict[str, Any], extra: dict[str, Any], path: str, problems: list[str]
) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        name = f"{path}{key}"
        flag = _SETTLED_BY.get(name)
        remedy = f"Set {flag} instead." if flag else "It is fixed."
        if isinstance(derived.get(key), dict) and isinstance(value, dict):
            merged[key] = _merged(derived[key], value, f"{name}.", problems)
        elif key in derived and derived[key] != value:
            problems.append(
                f"deepspeed: {name} {value!r} contradicts the derived {derived[key]!r}. {remedy}"
            )
        elif key not in derived and flag:
            problems.append(f"deepspeed: {name} is not set by hand. {remedy}")
        else:
            merged[key] = value
    return merged
