"""Pretrain a GPT with context parallelism: config -> grid -> data -> model -> engine -> train.

deepspeed pretrain_gpt.py --context-parallel striped
deepspeed --num_gpus 2 pretrain_gpt.py --config configs/tiny-cpu.yaml --context-parallel striped
python pretrain_gpt.py --config configs/tiny-cpu.yaml --world-size 2 --dry-run
"""

import sys

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

from megatron_ring.config import Config
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.engine.deepspeed_groups import start_processes
from megatron_ring.engine.extra_keys import resolve_settings
from megatron_ring.errors import reporting_errors
from megatron_ring.monitoring.metrics import NullReporter
from megatron_ring.monitoring.outputs import tolerate_console_errors
from megatron_ring.monitoring.ring_profile.monitor import RingMonitor, build_progress_tracker
from megatron_ring.monitoring.watchdog import ring_watchdog
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus, abort_collectively
from megatron_ring.parallel.entry_point import report_once
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.rendezvous import leave_processes
from megatron_ring.preflight.self_test import run_self_test_only, run_startup_check
from megatron_ring.settings.precision import device_type
from megatron_ring.training import checkpointing, console
from megatron_ring.training.assembly import build_model, start_engine
from megatron_ring.training.entry import parse_arguments
from megatron_ring.training.loop import train
from megatron_ring.training.start import Start
from megatron_ring.training.stopping import Stopping


def main(config: Config, environment: Environment, stopping: Stopping) -> None:
    """Run a dry run, the self-test, or training, as ``config`` selects."""
    is_rank_zero = environment.global_rank == 0
    if config.dry_run:
        world_size = config.parallel.world_size or environment.world_size
        print(console.plan(resolve_settings(config, world_size)))
        return
    start_processes(environment, device_type())
    consensus = Consensus.build()
    if config.self_test == "only":
        run_self_test_only(config, environment, consensus)
        return

    start = Start.build(config, environment, consensus)
    if start.lease:
        stopping.before_leaving(start.lease.release)
    if is_rank_zero:
        print(console.opening(start))
    setup = start.setup
    ring_timeout = config.parallel.ring_timeout
    groups = ProcessGroups.build(setup.grid, environment.global_rank, ring_timeout)
    if config.self_test == "start" and environment.world_size > 1:
        run_startup_check(setup, groups, consensus)

    progress = build_progress_tracker(setup)
    reduction = config.parallel.context_parallel_reduction
    attention = ContextParallelAttention(
        setup.layout, setup.kernel.name, groups, progress, reduction
    )
    model = build_model(setup, groups, attention, start.vocab_size)
    progress.track_layers(model)
    engine = start_engine(model, setup, groups)
    if config.logging.profile_ring:
        engine.wrap_optimizer_step(progress.in_optimizer_step)
    if start.stored:
        with abort_collectively():
            checkpointing.resume(engine, start.stored, consensus)

    report = console.report(start, engine) if is_rank_zero else NullReporter()
    saver = checkpointing.Saver(setup, consensus, start.stored, start.lease)
    watch = RingMonitor(setup, progress)
    stopping.begin(Consensus.build())
    with ring_watchdog(progress, groups, ring_timeout, consensus):
        with abort_collectively():
            saved = train(engine, start, saver, report, stopping, progress, watch)
        if is_rank_zero:
            print(console.closing(report, config, saved))
        for line in watch.finish():
            print(line)
        stopping.close(saved)
        leave_processes()


if __name__ == "__main__":
    tolerate_console_errors()
    with reporting_errors():
        environment = Environment.read()
    stopping = Stopping(
        is_rank_zero=environment.global_rank == 0, is_local_rank_zero=environment.local_rank == 0
    )
    with report_once(environment), stopping:
        main(parse_arguments(environment), environment, stopping)
    sys.exit(stopping.exit_code)
