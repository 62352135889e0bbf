"""DeepSpeed's config: keys derived from our options, merged with the user's extra keys.

An extra key that one of our options determines is refused. Keys that DeepSpeed does not have are
refused where it can be imported (engine/extra_keys.py).
"""

import re
from typing import Any

from megatron_ring import untrusted
from megatron_ring.config import Config, MemoryConfig
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.grid import Grid

# Keys of DeepSpeed's config -> the flags that determine them. Derived keys that are not listed here
# are fixed.
_DETERMINED_BY = {
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
    "bfloat16": "--dtype",
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


# DeepSpeed's default for reduce_bucket_size, in elements.
MAX_BUCKET_ELEMENTS = 500_000_000


def reduce_bucket_elements(parameters: int, requested: int | None = None) -> int:
    """Return the elements of the buffer in which DeepSpeed reduces gradients.

    ``parameters``: of the process, whose gradients then fit into one bucket. DeepSpeed's default is
    the upper limit. ``requested``: the user's reduce_bucket_size, which is taken as it is.

    No other bucket size of DeepSpeed 0.19.8 allocates memory: stage3_prefetch_bucket_size,
    stage3_max_live_parameters, stage3_max_reuse_distance and stage3_param_persistence_threshold
    limit how much of the model is gathered at a time, and allgather_bucket_size has no effect
    with a torch that has all_gather_into_tensor.
    """
    return requested or min(parameters, MAX_BUCKET_ELEMENTS)


def with_bucket_size(settings: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's config with a bucket for the ``parameters`` of this process."""
    zero = settings["zero_optimization"]
    bucket = reduce_bucket_elements(parameters, zero.get("reduce_bucket_size"))
    return settings | {"zero_optimization": zero | {"reduce_bucket_size": bucket}}


def derive(config: Config, grid: Grid, micro_batches: int, dtype: str) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize``, without the size of its bucket.

    The engine adds that (``with_bucket_size``), because it depends on the tokenizer's vocabulary.

    DeepSpeed treats context ranks as data ranks, so its batch sizes count a sequence once for each
    of its shards. Raises ConfigError for extra keys that contradict derived ones.
    """
    training = config.training
    logging = config.logging
    derived = {
        "train_batch_size": training.micro_batch_size * micro_batches * grid.data_context,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": training.clip_grad,
        "zero_optimization": {"stage": training.zero_stage, **_offload(config.memory)},
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        # Reductions over ranks are in fp32 whatever the compute dtype is: the rounding errors of
        # bf16 grow with the ring.
        "communication_data_type": "fp32",
        # DeepSpeed would split what stages exchange over tensor ranks, assuming that all have the
        # same. With sequence_parallel they have different parts already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # The optimizer is torch's AdamW, offloaded or not.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The loss is scaled for a mean over ranks and micro-batches (loss_and_norm.py).
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
    extra = _with_numbers(training.deepspeed)
    merged = _merge(derived, extra, "", problems)
    problems += _count_problems(extra.get("zero_optimization"))
    if problems:
        raise ConfigError(problems)
    return merged


def _offload(memory: MemoryConfig) -> dict[str, Any]:
    """Return ZeRO's offload keys. DeepSpeed pins the memory itself where that is of use."""
    devices = {"offload_optimizer": memory.offload_optimizer, "offload_param": memory.offload_param}
    return {key: {"device": device} for key, device in devices.items() if device != "none"}


# Numbers that YAML 1.1 reads as text: it wants a point and a sign, as in 5.0e+8.
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}")

# Keys of zero_optimization that the planner computes with -> the smallest legal value.
_COUNTS = {"reduce_bucket_size": 1, "stage3_max_live_parameters": 0}
_MAX_COUNT = 10**12


def _with_numbers(value: Any) -> Any:
    """Return extra keys with text such as 5e8, as users write bucket sizes, as numbers."""
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        value = float(value)
    # DeepSpeed computes with 5e8 elements as a whole number too.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count_problems(zero: Any) -> list[str]:
    problems = []
    for key, smallest in _COUNTS.items():
        value = zero.get(key, smallest) if isinstance(zero, dict) else smallest
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not (is_whole and smallest <= value <= _MAX_COUNT):
            problems.append(
                f"deepspeed: zero_optimization.{key} {untrusted.shown(value)} must be a whole "
                f"number from {smallest} to {_MAX_COUNT}. Change it, or leave it out."
            )
    return problems


def _merge(
    derived: dict[str, Any], extra: dict[str, Any], path: str, problems: list[str]
) -> dict[str, Any]:
    """Merge extra keys into derived ones; appends to ``problems`` those that are refused."""
    merged = dict(derived)
    for key, value in extra.items():
        name = f"{path}{key}"
        flag = _DETERMINED_BY.get(name)
        remedy = f"Set {flag} instead." if flag else "It is fixed."
        if isinstance(derived.get(key), dict) and isinstance(value, dict):
            merged[key] = _merge(derived[key], value, f"{name}.", problems)
        elif key in derived and derived[key] != value:
            problems.append(
                f"deepspeed: {name} {value!r} contradicts the derived {derived[key]!r}. {remedy}"
            )
        elif key not in derived and flag:
            problems.append(f"deepspeed: {name} is determined by other options. {remedy}")
        else:
            merged[key] = value
    return merged
