"""Pretrain a GPT whose attention is split over the sequence: config -> grid -> data -> model -> engine -> train.

deepspeed pretrain_gpt.py --context-parallel striped
deepspeed --num_gpus 2 pretrain_gpt.py --config configs/tiny-cpu.yaml --context-parallel striped
python pretrain_gpt.py --config configs/tiny-cpu.yaml --world-size 2 --context-parallel striped --dry-run
"""

import sys

from megatron_ring.config import Config
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.data.dataset import Dataset
from megatron_ring.parallel.agreement import Agreement
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.watchdog import watched
from megatron_ring.parallel.whereabouts import Whereabouts
from megatron_ring.training import checkpointing, console
from megatron_ring.training.assembly import build_model, start_engine
from megatron_ring.training.engine import leave_processes, start_processes
from megatron_ring.training.entry import arguments, spoken_once
from megatron_ring.training.loop import train
from megatron_ring.training.metrics import Silence
from megatron_ring.training.precision import device_type
from megatron_ring.training.self_test.alike import check_data, check_options_and_code
from megatron_ring.training.self_test.report import self_test
from megatron_ring.training.self_test.together import leaving_together, on_every
from megatron_ring.training.setup import Setup
from megatron_ring.training.stopping import Stopping


def main(config: Config, environment: Environment, stopping: Stopping) -> None:
    speaks = environment.global_rank == 0
    if config.dry_run:
        return print(console.plan(Setup.of(config, config.parallel.world_size or environment.world_size)))
    start_processes(environment, device_type())
    agreement = Agreement.build()
    with leaving_together():
        check_options_and_code(config, agreement)
        setup = on_every(agreement, lambda: Setup.of(config, environment.world_size))
        if config.self_test == "only":
            return test_alone(setup, environment, agreement)
        dataset = on_every(agreement, lambda: Dataset.open(config.data, config.training.seed, progress=speaks))
        check_data(config.data, agreement)
        vocab_size = config.model.vocabulary_size(dataset.tokenizer.vocab_size)
        stored = checkpointing.find(setup, vocab_size, agreement)
    if speaks:
        print(console.opening(setup, dataset, stored))
    place, ring_timeout = Whereabouts(), config.parallel.ring_timeout
    groups = ProcessGroups.build(setup.grid, environment.global_rank, ring_timeout)
    attention = ContextParallelAttention(setup.layout, setup.kernel.name, groups, place)
    if config.self_test == "start" and environment.world_size > 1:
        with leaving_together():
            tested = self_test(setup, groups, agreement)
        if speaks:
            print(tested.line())
    model = build_model(setup, groups, attention, vocab_size)
    place.follow(model)
    engine = start_engine(model, setup, groups)
    if stored:
        checkpointing.resume(engine, stored)

    report = console.report(setup, dataset, stored, engine) if speaks else Silence()
    at = setup.grid.coordinates(environment.global_rank)
    saver = checkpointing.Saver(setup, agreement)
    stopping.begin(Agreement.build())
    with watched(place, groups, ring_timeout, agreement):
        saved = train(engine, setup, at, dataset, stored.state if stored else None, saver, report, stopping, place)
        if speaks:
            print(console.closing(report, config, saved))
        stopping.close(saved)
        leave_processes()


def test_alone(setup: Setup, environment: Environment, agreement: Agreement) -> None:
    """All that --self-test does once options and code agree: nothing is trained, and data is asked for only by name."""
    config = setup.config
    if config.data.data_path:
        on_every(agreement, lambda: Dataset.open(config.data, config.training.seed))
        check_data(config.data, agreement)
    tested = self_test(setup, ProcessGroups.build(setup.grid, environment.global_rank), agreement)
    if environment.global_rank == 0:
        print(tested.in_full())
    leave_processes()


if __name__ == "__main__":
    environment = Environment.read()
    with spoken_once(environment), Stopping(speaks=environment.global_rank == 0) as stopping:
        main(arguments(environment), environment, stopping)
    sys.exit(stopping.exit_code)
