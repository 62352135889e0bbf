"""Resuming after N steps equals an uninterrupted run: bitwise on the same grid, else closely."""

import contextlib
import math
import os
import re
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import retention, store, tensors
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError, DataError, Diverged
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.checkpoint_selection import select_checkpoint
from tests.checkpoint import small
from tests.distributed import RankFailed, run_ranks
from tests.training import tiny

N = 2


DTYPES_AND_STAGES = {
    f"{dtype}-{stage}": {"training": {"dtype": dtype, "zero_stage": stage}}
    for dtype, stage in (
        ("fp32", 0),
        ("fp32", 1),
        ("fp32", 2),
        ("fp32", 3),
        ("bf16", 0),
        ("bf16", 1),
    )
}

TENSOR = {"tensor_model_parallel_size": 2}
TENSOR_AND_PIPE = TENSOR | {"pipeline_model_parallel_size": 2}
MICRO = {"micro_batch_size": 2}
OTHER_GRIDS = {
    "tensor-pipe": {"parallel": TENSOR_AND_PIPE, "training": {"zero_stage": 1, **MICRO}},
    "tensor-pipe-untied": {
        "model": {"untie_embeddings_and_output_weights": True},
        "parallel": TENSOR_AND_PIPE | {"sequence_parallel": True},
        "training": {"zero_stage": 0, **MICRO},
    },
    "tensor-pipe-bf16": {
        "parallel": TENSOR_AND_PIPE,
        "training": {"zero_stage": 1, "dtype": "bf16", **MICRO},
    },
    "tensor-ring": {
        "parallel": TENSOR | {"sequence_parallel": True},
        "training": {"zero_stage": 1},
    },
    "tensor-ring-3": {"parallel": TENSOR, "training": {"zero_stage": 3}},
}


def resume_all(
    rank: int, world_size: int, folder: Path, prefix: Path, cases: dict[str, dict]
) -> None:
    for name, sections in cases.items():
        saving = {"save": str(folder / name), "load": str(folder / name)}
        check_resume(tiny.config(**sections, checkpoint=saving), rank, world_size, prefix)


def check_resume(config: Config, rank: int, world_size: int, prefix: Path) -> None:
    uninterrupted = tiny.Run(config, prefix, rank, world_size)
    before = uninterrupted.steps(N)
    path = uninterrupted.save()
    expected = uninterrupted.steps(N)

    resumed = tiny.Run(config, prefix, rank, world_size)
    stored = resumed.find()
    assert stored.path == path
    resumed.resume(stored)
    assert resumed.steps(N) == expected, f"losses and gradient norms after resuming {path}"
    assert expected != before
    actual_parameters = resumed.parameters()
    expected_parameters = uninterrupted.parameters()
    assert actual_parameters.keys() == expected_parameters.keys()
    for name, expected_parameter in expected_parameters.items():
        assert torch.equal(actual_parameters[name], expected_parameter), name


@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, DTYPES_AND_STAGES), (4, OTHER_GRIDS)], ids=["ring", "others"]
)
def test_a_resumed_run_is_bitwise_the_same_on_the_same_grid(world_size, cases, tmp_path):
    run_ranks(world_size, resume_all, tmp_path, tiny.write_store(tmp_path), cases)


# The axes of each grid, and its ZeRO stage. A run on one grid is resumed on the next, and a run on
# the last one on the first.
GRIDS = {
    "ring-of-4": ({"context_parallel_size": 4}, 3),
    "tensor-pipe": (TENSOR_AND_PIPE | {"context_parallel_size": 1}, 1),
    "one-process": ({"context_parallel_size": 1}, 0),
    "ulysses-data": ({"context_parallel_size": 2, "ulysses_degree": 2}, 2),
    "pipe-ring": ({"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, 0),
    "tensor-data": (TENSOR | {"context_parallel_size": 1, "sequence_parallel": True}, 3),
    "tensor-ring": (TENSOR | {"context_parallel_size": 2}, 0),
    "data": ({"context_parallel_size": 1}, 1),
}
NEXT = dict(zip(GRIDS, [*list(GRIDS)[1:], *GRIDS]))


def ranks_of(grid: str) -> int:
    return 1 if grid == "one-process" else 4


def on_grid(grid: str, folder: Path) -> Config:
    parallel, zero_stage = GRIDS[grid]
    saving = {"save": str(folder), "load": str(folder)}
    return tiny.config(
        parallel=parallel,
        training={"micro_batch_size": 1, "zero_stage": zero_stage},
        checkpoint=saving,
    )


def save_and_continue(rank: int, world_size: int, folder: Path, prefix: Path) -> dict[str, list]:
    continued = {}
    for grid in (grid for grid in GRIDS if ranks_of(grid) == world_size):
        run = tiny.Run(on_grid(grid, folder / grid), prefix, rank, world_size)
        run.steps(2)
        run.save()
        continued[grid] = run.steps(2)
    return continued


def resume_on_next_grid(rank: int, world_size: int, folder: Path, prefix: Path) -> dict[str, list]:
    continued = {}
    for grid in (grid for grid in GRIDS if ranks_of(NEXT[grid]) == world_size):
        run = tiny.Run(on_grid(NEXT[grid], folder / grid), prefix, rank, world_size)
        run.resume(run.find())
        continued[grid] = run.steps(2)
    return continued


def test_a_run_resumed_on_another_grid_has_the_same_losses_up_to_rounding(tmp_path):
    prefix = tiny.write_store(tmp_path)
    expected: dict[str, list] = {}
    resumed: dict[str, list] = {}
    for world_size in (1, 4):
        expected |= run_ranks(world_size, save_and_continue, tmp_path, prefix)[0]
    for world_size in (1, 4):
        resumed |= run_ranks(world_size, resume_on_next_grid, tmp_path, prefix)[0]
    assert expected.keys() == resumed.keys() == GRIDS.keys()
    for grid in GRIDS:
        torch.testing.assert_close(
            torch.tensor(resumed[grid]), torch.tensor(expected[grid]), rtol=1e-5, atol=0
        )


def finetune(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    first = tiny.Run(
        tiny.config(checkpoint={"save": str(folder / "first")}), prefix, rank, world_size
    )
    before = first.steps(N)
    first.save()
    yarn = {
        "rope_scaling": "yarn",
        "rope_scaling_factor": 2.0,
        "rope_original_length": tiny.SEQ // 2,
    }
    folders = {"load": str(folder / "first"), "save": str(folder / "second"), "finetune": True}
    second = tiny.Run(tiny.config(model=yarn, checkpoint=folders), prefix, rank, world_size)
    second.resume(second.find())
    assert second.step == second.loader.consumed_samples == 0
    loaded_parameters = second.parameters()
    for name, trained_parameter in first.parameters().items():
        assert torch.equal(loaded_parameters[name], trained_parameter), name
    after = second.steps(N)
    assert after[0][0] < before[0][0], "it starts from trained weights"
    second.save()

    again = tiny.Run(tiny.config(model=yarn, checkpoint=folders), prefix, rank, world_size)
    again.resume(again.find())
    assert again.step == N, "started again, it resumes from its own checkpoint"
    assert again.steps(1) == second.steps(1)


def test_finetune_loads_only_weights_and_then_resumes_from_its_own_checkpoints(tmp_path):
    run_ranks(2, finetune, tmp_path, tiny.write_store(tmp_path))


def save_while_training(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    saving = {
        "save": str(folder / "saved"),
        "load": str(folder / "saved"),
        "async_save": True,
        "keep_last": 2,
    }
    config = tiny.config(checkpoint=saving)
    uninterrupted = tiny.Run(config, prefix, rank, world_size)
    with slow_files():
        for _ in range(3):
            uninterrupted.steps(1)
            uninterrupted.saver.save(uninterrupted.engine, uninterrupted.state())
        assert not (folder / "saved" / "step-00000003").exists(), "the thread is still writing"
        expected = uninterrupted.steps(N)
    assert uninterrupted.saver.finish().name == "step-00000003"

    resumed = tiny.Run(config, prefix, rank, world_size)
    resumed.resume(resumed.find())
    assert resumed.steps(N) == expected


@contextlib.contextmanager
def slow_files():
    """Make a part take as long to write as a large one on a slow disk."""
    write_part = tensors.write_part

    def slow(*args):
        time.sleep(1)
        return write_part(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "write_part", slow)
        yield


def test_an_asynchronous_checkpoint_has_the_state_at_the_time_of_the_save(tmp_path):
    run_ranks(2, save_while_training, tmp_path, tiny.write_store(tmp_path))


def fail_in_thread(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    run = tiny.Run(
        tiny.config(checkpoint={"save": str(folder / "saved"), "async_save": True}),
        prefix,
        rank,
        world_size,
    )
    run.steps(1)
    with file_size_limit(20_000 if rank == 1 else 1 << 40):
        run.saver.save(run.engine, run.state())
        with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 1"):
            run.saver.finish()
    assert run.save().name == "step-00000001", "the next save succeeds"


def test_an_error_of_the_writing_thread_is_raised_on_all_ranks_by_the_next_call(tmp_path):
    run_ranks(2, fail_in_thread, tmp_path, tiny.write_store(tmp_path))


ERRORS = {
    "MemoryError": MemoryError("cannot allocate"),
    "RuntimeError": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "SystemExit": SystemExit(3),
}
ACTS = {
    "write_part": (tensors, 1),
    "flush_and_checksum": (store, 1),
    "write_index": (tensors, 0),
    "commit": (store, 0),
}


def fail_in_each_act(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    """Raise an error on one rank in each act of a save, with and without the thread."""
    runs = {
        async_save: tiny.Run(
            tiny.config(
                checkpoint={"save": str(folder / str(async_save)), "async_save": async_save}
            ),
            prefix,
            rank,
            world_size,
        )
        for async_save in (False, True)
    }
    for async_save, run in runs.items():
        run.steps(1)
        first = run.save()
        for (act, (module, failing)), (name, error) in zip(
            ACTS.items(), [*ERRORS.items(), *ERRORS.items()]
        ):
            run.steps(1)
            with pytest.MonkeyPatch.context() as patch:
                if rank == failing:
                    patch.setattr(module, act, lambda *_, error=error: _raise(error))
                with pytest.raises(
                    CheckpointError, match=f"of step {run.step} to .*: {name}: "
                ) as failure:
                    run.save()
            assert "step-00000001 stays the newest" in str(failure.value)
            cause = failure.value.__cause__
            assert rank != failing or error in (cause, cause and cause.__cause__)
            assert store.newest(folder / str(async_save)).path == first
            # The main threads' group still works.
            assert run.consensus.gather(lambda: rank) == [0, 1]
        assert run.save().name == f"step-{run.step:08d}"


def _raise(error: BaseException) -> None:
    raise error


def test_an_error_of_any_kind_on_one_rank_is_raised_on_all(tmp_path):
    run_ranks(2, fail_in_each_act, tmp_path, tiny.write_store(tmp_path))


def save_and_raise(run: tiny.Run) -> None:
    with run.saver:
        run.saver.save(run.engine, run.state())
        assert not Path(run.config.checkpoint.save, "step-00000001").exists()
        raise DataError("no more data")


def fail_while_saving(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    run = tiny.Run(
        tiny.config(checkpoint={"save": str(folder / "saved"), "async_save": True}),
        prefix,
        rank,
        world_size,
    )
    run.steps(1)
    with slow_files(), pytest.raises(DataError, match="^no more data$"):
        save_and_raise(run)
    assert store.newest(folder / "saved").state.step == 1, "the save in progress is finished"


def test_a_save_in_progress_is_finished_when_the_run_ends_with_an_error(tmp_path):
    run_ranks(2, fail_while_saving, tmp_path, tiny.write_store(tmp_path))


def save_and_load_non_finite(
    rank: int, world_size: int, folder: Path, prefix: Path, cases: dict[str, dict]
) -> None:
    """Save and load non-finite weights or moments on one rank; both must fail."""
    for name, sections in cases.items():
        kind = sections["kind"]
        saving = {"save": str(folder / name), "load": str(folder / name), "keep_last": 1}
        config = tiny.config(training=sections["training"], checkpoint=saving)
        run = tiny.Run(config, prefix, rank, world_size)
        run.steps(1)
        first = run.save()
        run.steps(1)
        if rank == 1:
            run.engine.pieces()[0].values[kind].view(-1)[:2] = torch.tensor([math.nan, math.inf])
        with pytest.raises(
            Diverged, match=f"{kind}/.* has 2 values that are nan or infinite"
        ) as failure:
            run.save()
        assert f"{first.name} stays the newest" in str(failure.value)
        assert store.newest(folder / name).path == first

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "check_finite", lambda *_: None)
            patch.setattr(retention, "remove_outdated", lambda *_: None)
            run.save()
        with pytest.raises(CheckpointError, match=f"{kind}/.* nan or infinite") as refused:
            run.resume(run.find())
        assert f"such as {first}" in str(refused.value)
        assert ("--finetune" in str(refused.value)) == (kind != "weight")
        older = replace(config, checkpoint=replace(config.checkpoint, load=str(first)))
        again = tiny.Run(older, prefix, rank, world_size)
        again.resume(again.find())
        assert again.step == 1


NON_FINITE = {
    "fp32-0": DTYPES_AND_STAGES["fp32-0"] | {"kind": "weight"},
    "fp32-3": DTYPES_AND_STAGES["fp32-3"] | {"kind": "exp_avg"},
    "bf16-1": DTYPES_AND_STAGES["bf16-1"] | {"kind": "weight"},
}


def test_non_finite_tensors_are_neither_saved_nor_loaded(tmp_path):
    run_ranks(2, save_and_load_non_finite, tmp_path, tiny.write_store(tmp_path), NON_FINITE)


def save_on_a_full_disk(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    saving = {"save": str(folder / "saved"), "load": str(folder / "saved")}
    run = tiny.Run(tiny.config(checkpoint=saving), prefix, rank, world_size)
    run.steps(1)
    first = run.save()
    run.steps(1)
    with (
        file_size_limit(20_000 if rank == 1 else 1 << 40),
        pytest.raises(CheckpointError) as failure,
    ):
        run.save()
    assert "cannot write the checkpoint of step 2" in str(failure.value)
    assert "step-00000001 stays the newest" in str(failure.value)
    assert store.newest(folder / "saved").path == first
    assert sorted(path.name for path in (folder / "saved").iterdir()) == [
        "latest",
        "step-00000001",
    ], "no leftovers"
    run.resume(run.find())


@contextlib.contextmanager
def file_size_limit(size: int):
    """Let this process write no file of more than ``size`` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_on_one_rank_fails_on_all_and_keeps_the_previous_checkpoint(tmp_path):
    run_ranks(2, save_on_a_full_disk, tmp_path, tiny.write_store(tmp_path))


def save_until_killed(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    run = tiny.Run(config_keeping_two(folder), prefix, rank, world_size)
    while True:
        run.steps(1)
        run.save()
        if rank == 0 and run.step == 2:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()


def resume_from_previous(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    resumed = tiny.Run(config_keeping_two(folder), prefix, rank, world_size)
    stored = resumed.find()
    [reason] = stored.skipped
    assert "part-00000.safetensors has other bytes than" in reason
    resumed.resume(stored)
    uninterrupted = tiny.Run(config_keeping_two(folder), prefix, rank, world_size)
    uninterrupted.steps(stored.state.step)
    assert resumed.steps(N) == uninterrupted.steps(N)


def config_keeping_two(folder: Path) -> Config:
    return tiny.config(
        checkpoint={"save": str(folder / "saved"), "load": str(folder / "saved"), "keep_last": 2}
    )


def test_a_killed_run_with_a_damaged_newest_checkpoint_resumes_from_the_previous_one(
    tmp_path,
):
    prefix = tiny.write_store(tmp_path)
    with pytest.raises(RankFailed):
        run_ranks(2, save_until_killed, tmp_path, prefix)
    weights = store.newest(tmp_path / "saved").path / "part-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    run_ranks(2, resume_from_previous, tmp_path, prefix)


def verify_without_memory(rank: int, world_size: int, folder: Path) -> None:
    """Run out of memory on one rank while files are verified: the checkpoint is not damaged."""
    consensus = Consensus.build()
    for load in (folder, folder / "step-00000010"):
        setup = RunSettings.resolve(tiny.config(checkpoint={"load": str(load)}), world_size)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(store, "check", lambda *_: _raise(MemoryError("cannot allocate")))
            with pytest.raises(
                CheckpointError, match="step-00000010 cannot be read: MemoryError: cannot"
            ):
                select_checkpoint(setup, tiny.VOCAB, consensus)
        assert select_checkpoint(setup, tiny.VOCAB, consensus).state.step == 10


def test_a_checkpoint_is_not_skipped_because_a_rank_has_no_memory_to_read_it(tmp_path):
    for step in (5, 10):
        small.write(tmp_path, step, tiny.config())
    run_ranks(2, verify_without_memory, tmp_path)


# ---- what --load names ----


def select_each(rank: int, world_size: int, cases: list[dict], cwd: Path) -> list[str]:
    """Return for each case the selected checkpoint, "step 0" or the error."""
    os.chdir(cwd)
    consensus = Consensus.build()
    selected = []
    for folders in cases:
        setup = RunSettings.resolve(tiny.config(checkpoint=folders), world_size)
        try:
            stored = select_checkpoint(setup, tiny.VOCAB, consensus)
            selected.append(f"{stored.path} {stored.state.step}" if stored else "step 0")
        except CheckpointError as error:
            selected.append(str(error))
    return selected


LOADS = [
    ({"load": "run"}, "run/step-00000010 10"),
    ({"load": "run/step-00000005"}, "run/step-00000005 5"),
    ({"load": "run/step-00000005/"}, "run/step-00000005 5"),
    ({"load": "best"}, "best 5"),
    ({"load": "run/step-00000005", "save": "other"}, "run/step-00000005 5"),
    ({"load": "run/step-00000005", "save": "run"}, "run/step-00000005 5"),
    ({"load": "run/step-00000005", "save": "other", "finetune": True}, "run/step-00000005 0"),
    (
        {"load": "run/step-00000005", "save": "run", "finetune": True},
        "Set --save to another folder",
    ),
    (
        {"load": "run/step-00000007"},
        "run/step-00000007 is not complete: .*The same folder has .*step-00000005",
    ),
    ({"load": "run/latest"}, r"run/latest is a file.*\n?Set --load"),
    ({"load": "run/step-00000005/state.json"}, "is a file"),
    ({"load": "empty"}, "step 0"),
    (
        {"load": "empty", "finetune": True, "save": "other"},
        "holds no checkpoint to take weights from",
    ),
    ({"load": "hidden-files"}, "step 0"),
    ({"load": "killed"}, "step 0"),
    ({"load": "nowhere"}, "nowhere does not exist"),
    ({"load": "nowhere", "save": "nowhere"}, "step 0"),
    ({"load": "logs"}, "logs holds no checkpoint, and is not empty: it has metrics.jsonl"),
    ({"load": "logs", "save": "./logs"}, "step 0"),
    ({"load": "hf"}, r"hf is a Hugging Face folder .*convert_checkpoint.py import hf OUT"),
    ({"load": "hf", "save": "hf"}, "hf is a Hugging Face folder"),
    ({"load": "megatron"}, "is a Megatron checkpoint"),
    ({"load": "parent"}, "Set --load parent/inner"),
    ({"load": "broken"}, "is a checkpoint that is not whole"),
]


def test_load_selects_a_checkpoint_starts_at_step_0_or_is_refused(tmp_path):
    model = tiny.config()
    for step in (5, 7, 10):
        small.write(tmp_path / "run", step, model)
    (tmp_path / "run" / "step-00000007" / "rank-0.pt").unlink()
    small.write(tmp_path / "parent" / "inner", 5, model)
    (tmp_path / "best").symlink_to("run/step-00000005")
    for file in (
        "hidden-files/.DS_Store",
        "killed/.partial-00000005/part-00000.safetensors",
        "logs/metrics.jsonl",
        "hf/config.json",
        "hf/model.safetensors",
        "megatron/latest_checkpointed_iteration.txt",
        "megatron/iter_0000001/mp_rank_00/model_optim_rng.pt",
        "broken/tensors.json",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "empty").mkdir()
    of_ranks = run_ranks(2, select_each, [folders for folders, _ in LOADS], tmp_path)
    assert of_ranks[0] == of_ranks[1]
    for (folders, expected), selected in zip(LOADS, of_ranks[0], strict=True):
        assert re.search(expected, selected, re.S), f"{folders}: {selected}"
