"""Degrees: the size of each axis, and which sizes a number of processes allows. Pure arithmetic.

Every problem states the legal sizes. ``Grid.of`` requires that there are no problems here.
"""

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import counted, flag


def problems(config: ParallelConfig, world_size: int, dry_run: bool = False) -> list[str]:
    """Return why ``world_size`` processes cannot form this grid; each size is legal in itself.

    With ``dry_run`` no processes are started, and their number is set with --world-size.
    """
    if config.world_size not in (0, world_size):
        return [
            f"world_size {config.world_size} is what this config is meant for, "
            f"but the run has {counted(world_size, 'process')}. "
            f"Start {config.world_size}, or set --world-size 0."
        ]
    other_number = "--world-size" if dry_run else "start another number of processes"
    problems = _division_problems(config, world_size, other_number)
    if config.context_parallel == "none":
        return problems + _problems_of_whole_sequences(config)
    if config.context_parallel_size == 0 and problems:
        return problems  # the number of context ranks is unknown
    return problems + _ulysses_problems(config, context_size(config, world_size))


def context_size(config: ParallelConfig, world_size: int) -> int:
    """Return C: the configured size, or all processes that pipeline and tensor leave."""
    if config.context_parallel == "none":
        return 1
    left = world_size // (config.pipeline_model_parallel_size * config.tensor_model_parallel_size)
    return config.context_parallel_size or left


def _division_problems(config: ParallelConfig, world_size: int, other_number: str) -> list[str]:
    """Check that pipeline, tensor and context each divide the processes that the former leave."""
    sizes = {
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
    }
    if config.context_parallel != "none":
        sizes["context_parallel_size"] = config.context_parallel_size or 1
    left = world_size
    dividing = []
    problems = []
    for name, size in sizes.items():
        if left % size == 0:
            left //= size
            dividing += [f"{name} {size}"] if size > 1 else []
            continue
        which = "that run"
        if dividing:
            leave = "leaves" if len(dividing) == 1 else "leave"
            which = f"that {' and '.join(dividing)} {leave} of {world_size}"
        problems.append(
            f"{name} {size} does not divide the {counted(left, 'process')} {which}. "
            f"Legal: {divisors(left)}. Set {flag(name)}, or {other_number}."
        )
    return problems


def _ulysses_problems(config: ParallelConfig, context: int) -> list[str]:
    degree = config.ulysses_degree
    if context % degree == 0:
        return []
    return [
        f"ulysses_degree {degree} does not divide the {counted(context, 'context rank')}. "
        f"Legal: {divisors(context)}. Set --ulysses-degree, or --context-parallel-size."
    ]


def _problems_of_whole_sequences(config: ParallelConfig) -> list[str]:
    problems = []
    if config.context_parallel_size > 1:
        problems.append(
            f"context_parallel_size {config.context_parallel_size} needs a layout, "
            "but context_parallel is none. Set --context-parallel striped (or ring, zigzag)."
        )
    if (degree := config.ulysses_degree) > 1:
        problems.append(
            f"ulysses_degree {degree} splits sequences, but context_parallel none keeps them "
            f"whole. Set --context-parallel striped (with --context-parallel-size {degree}: a ring "
            "of one), or --ulysses-degree 1."
        )
    return problems


def divisors(number: int) -> str:
    """Format the sizes of an axis that divide ``number``: ``"1, 2, 4"`` for 4."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
