"""Degrees: how far each axis is split, and which splits a number of processes allows. Pure arithmetic on a config.

What is refused is refused with the sizes that would do. The grid is made of what has no problems here.
"""

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import flag


def problems(config: ParallelConfig, world_size: int, dry_run: bool = False) -> list[str]:
    """Why ``world_size`` processes cannot make this grid, of sizes that are legal in themselves.

    With ``dry_run`` no processes are started: their number is set with --world-size.
    """
    if config.world_size not in (0, world_size):
        return [
            f"world_size {config.world_size} is what this config is meant for, but {world_size} processes run. "
            f"Start {config.world_size}, or set --world-size 0."
        ]
    other_number = "--world-size" if dry_run else "start another number of processes"
    found = _division_problems(config, world_size, other_number)
    if config.context_parallel == "none":
        return found + _problems_of_whole_sequences(config)
    if config.context_parallel_size == 0 and found:
        return found  # how many context ranks there are is not known
    return found + _ulysses_problems(config, context_size(config, world_size))


def context_size(config: ParallelConfig, world_size: int) -> int:
    """C: what was asked for, or all that pipeline and tensor leave."""
    if config.context_parallel == "none":
        return 1
    left = world_size // (config.pipeline_model_parallel_size * config.tensor_model_parallel_size)
    return config.context_parallel_size or left


def _division_problems(config: ParallelConfig, world_size: int, other_number: str) -> list[str]:
    """Pipeline, tensor and context each divide what those before them leave."""
    sizes = {
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
    }
    if config.context_parallel != "none":
        sizes["context_parallel_size"] = config.context_parallel_size or 1
    left, takers, found = world_size, [], []
    for name, size in sizes.items():
        if left % size == 0:
            left //= size
            takers += [f"{name} {size}"] if size > 1 else []
        else:
            leave = "leaves" if len(takers) == 1 else "leave"
            which = f"that {' and '.join(takers)} {leave} of {world_size}" if takers else "that run"
            found.append(
                f"{name} {size} does not divide the {left} processes {which}. Legal: {divisors(left)}. "
                f"Set {flag(name)}, or {other_number}."
            )
    return found


def _ulysses_problems(config: ParallelConfig, context: int) -> list[str]:
    degree = config.ulysses_degree
    if context % degree == 0:
        return []
    return [
        f"ulysses_degree {degree} does not divide the {context} context ranks. Legal: {divisors(context)}. "
        "Set --ulysses-degree, or --context-parallel-size."
    ]


def _problems_of_whole_sequences(config: ParallelConfig) -> list[str]:
    found = []
    if config.context_parallel_size > 1:
        found.append(
            f"context_parallel_size {config.context_parallel_size} needs a layout, but context_parallel is none. "
            "Set --context-parallel striped (or ring, zigzag)."
        )
    if (degree := config.ulysses_degree) > 1:
        found.append(
            f"ulysses_degree {degree} splits sequences, but context_parallel none keeps them whole. Set "
            f"--context-parallel striped (with --context-parallel-size {degree}: a ring of one), or --ulysses-degree 1."
        )
    return found


def divisors(number: int) -> str:
    """The sizes of an axis that ``number`` can be shared out over: ``"1, 2, 4"`` for 4."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
