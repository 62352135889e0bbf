"""What a run prints: its settings and their reasons at the start, its summary at the end.

Also the whole output of --dry-run. Every line is a key of up to 16 characters and a value.
"""

from pathlib import Path

from megatron_ring.checkpoint import names
from megatron_ring.checkpoint.compatibility import changed_data_options, changed_token_stores
from megatron_ring.checkpoint.store import Stored, read_config
from megatron_ring.config import Config, DataConfig, ModelConfig, TrainingConfig, to_yaml
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.store_fingerprint import Fingerprint
from megatron_ring.engine.engine import Engine
from megatron_ring.errors import counted
from megatron_ring.monitoring.metrics import ConsoleReporter
from megatron_ring.plan.device_peaks import peak_flops
from megatron_ring.plan.dry_run import plan_lines
from megatron_ring.plan.parameters import parameter_count
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.schedule import Schedule, change_on_resume
from megatron_ring.training.start import Start


def opening(start: Start) -> str:
    """Return what is printed before the model is built."""
    config = start.setup.config
    token_ids = start.dataset.tokenizer.vocab_size
    rows = start.vocab_size
    parameters = parameter_count(config.model, rows, config.data.seq_length)
    padding = f" in {rows} rows" if rows > token_ids else ""
    lines = [
        *_settings(start.setup),
        *_schedule_lines(start.schedule, config.training),
        f"model            {parameters:,} parameters, {token_ids} token ids{padding}",
        *(f"data             {line}" for line in start.dataset.training.describe()),
    ]
    if start.stored:
        lines += start.stored.skipped
        lines += _resume_lines(start.stored, config, start.fingerprints)
    else:
        lines += _new_run_lines(config)
    return "\n".join(lines)


def _new_run_lines(config: Config) -> list[str]:
    """Describe a run from step 0 where the folders of --save or --load need an explanation."""
    earlier = _earlier_checkpoints(config)
    folders = config.checkpoint
    if earlier:
        return [
            f"new run          {earlier[0]} is of an earlier run. The first save of this one moves "
            f"{counted(len(earlier), 'checkpoint')} there into a sub-folder; --load {folders.save} "
            "continues that run"
        ]
    if folders.load:
        return [f"new run          load {folders.load} holds no checkpoint yet: weights are random"]
    return []


def _earlier_checkpoints(config: Config) -> list[Path]:
    """Return the checkpoints in the --save folder of a run from step 0, newest first."""
    return names.checkpoints(Path(config.checkpoint.save)) if config.checkpoint.save else []


def _resume_lines(stored: Stored, config: Config, fingerprints: list[Fingerprint]) -> list[str]:
    """Describe what the run resumes from, and what differs from the run that wrote it."""
    step = stored.state.step
    if step == 0:
        return [f"weights          {stored.path}, a new run"]
    lines = [f"resuming         {stored.path}, {counted(step, 'step')} done"]
    if _names_own_checkpoint(stored, config):
        save = config.checkpoint.save
        lines.append(
            "load             names a checkpoint of --save: the same command started again goes "
            f"back to step {step}. --load {save} continues from the newest"
        )
    train_iters = config.training.train_iters
    if step >= train_iters:
        lines.append(
            f"nothing to do    --train-iters is {train_iters}: set it above {step} to train further"
        )
    changed_rate = change_on_resume(step, read_config(stored.path).training, config.training)
    if changed_rate:
        lines.append(f"learning rate    {changed_rate}")
    differences = _data_differences(stored, config, fingerprints)
    if differences:
        lines.append(
            f"other data       {'; '.join(differences)}: the run continues at sample "
            f"{stored.state.consumed_samples:,}, which may be different text than in the earlier "
            "run, read before or not."
        )
    return lines


def _names_own_checkpoint(stored: Stored, config: Config) -> bool:
    """Return whether --load is one checkpoint of the --save folder, not the folder itself."""
    folders = config.checkpoint
    path = stored.path.absolute()
    is_named = path == Path(folders.load).absolute()
    return bool(folders.save) and is_named and path.parent == Path(folders.save).absolute()


def _data_differences(stored: Stored, config: Config, fingerprints: list[Fingerprint]) -> list[str]:
    """Describe how the data differs from the checkpoint's, without final periods."""
    other_stores = changed_token_stores(stored, fingerprints)
    differences = changed_data_options(stored, config)
    is_same_store = len(fingerprints) == 1 and stored.state.data and not other_stores
    if is_same_store:
        # The same store under another path is no difference.
        differences = [text for text in differences if not text.startswith("data_path ")]
    return [text.removesuffix(".") for text in [*differences, *other_stores]]


def report(start: Start, engine: Engine) -> ConsoleReporter:
    """Return the reporter of rank 0 and print the device's peak FLOP/s.

    That of a CPU is measured. That of a GPU is unknown unless its data sheet is listed.
    """
    setup = start.setup
    config = setup.config
    peak, source = peak_flops(setup.device, setup.precision.dtype)
    if peak:
        print(f"peak FLOP/s      {peak / 1e12:.4g} TFLOP/s a process, {source}")
    else:
        print(f"peak FLOP/s      {source}")
    return ConsoleReporter(
        config.logging,
        steps=range(start.state.step + 1, config.training.train_iters + 1),
        peak_flops=peak * setup.grid.world_size if peak else None,
        monitors=engine.monitors,
    )


def closing(report: ConsoleReporter, config: Config, saved: Path | None) -> str:
    """Return the summary and the paths of the run's output; draw the loss plot.

    The plot is written beside the metrics file. If that fails, a warning is printed.
    """
    lines = [report.close()]
    if saved:
        lines.append(f"checkpoint       {saved}")
    if config.logging.metrics_file:
        metrics = Path(config.logging.metrics_file)
        lines.append(f"metrics          {metrics}")
        # Not from a device or a pipe, which may have no end.
        if report.first and metrics.is_file():
            # Imported here, because matplotlib would take a tenth of the start of every rank.
            from megatron_ring.monitoring.plot import draw_loss

            plot = metrics.with_name("loss.png")
            if report.best_effort(f"loss plot {plot}", draw_loss, metrics, plot):
                lines.append(f"loss plot        {plot}")
    return "\n".join(line for line in lines if line)


def plan(setup: RunSettings) -> str:
    """Return the output of --dry-run: config, derived settings, placement, memory and messages."""
    training = setup.config.training
    settings = [*_settings(setup), *_schedule_lines(Schedule.of(training), training)]
    return "\n".join([to_yaml(setup.config), *settings, *plan_lines(setup)])


def _settings(setup: RunSettings) -> list[str]:
    """Describe the settings that were derived from the config, with reasons."""
    grid = setup.grid
    micro_batch_size = setup.config.training.micro_batch_size
    return [
        f"grid             {counted(grid.world_size, 'process')} = {grid.pipe} pipe x "
        f"{grid.data} data x {grid.context} context ({grid.ring} ring x {grid.ulysses} ulysses) x "
        f"{grid.tensor} tensor",
        f"layout           {_layout_description(setup)}, {_tokens_description(setup)}, "
        f"{setup.layout.shard_length} on each ring rank",
        *_placement_line(setup.layout),
        f"global batch     {counted(setup.global_batch_size, 'sequence')}, "
        f"{counted(setup.micro_batches, 'micro-batch')} of {micro_batch_size} on "
        f"{'1 data rank' if grid.data == 1 else f'each of {grid.data} data ranks'}",
        f"dtype            {setup.precision.name}: {setup.precision.reason}",
        f"attention        {setup.kernel.name}: {setup.kernel.reason}",
        *(f"operations       {line}" for line in setup.operations.describe()),
        *_split_line(setup.config.data),
        *_window_line(setup.config.model),
    ]


def _schedule_lines(schedule: Schedule, training: TrainingConfig) -> list[str]:
    """Return the warm-up, and the last rate if it was derived."""
    warmup, min_lr = schedule
    lines = [f"warm-up          {counted(warmup.iters, 'step')}: {warmup.reason}"]
    if training.lr_decay_style != "constant" and min_lr.reason.startswith("auto"):
        lines.append(f"min_lr           {min_lr.value:g}: {min_lr.reason}")
    return lines


def _split_line(data: DataConfig) -> list[str]:
    """Return the normalized shares of --split if it does not sum to 1."""
    if data.split_adds_up_to_1:
        return []
    given = ", ".join(f"{share:.6g}" for share in data.split)
    normalized = ", ".join(f"{share:.6g}" for share in data.shares)
    return [f"split            {given} adds up to {sum(data.split):.6g}: shares of {normalized}"]


def _window_line(model: ModelConfig) -> list[str]:
    """Return the window as counted here and in Megatron, which does not count the token itself."""
    window = model.window_size
    if not window:
        return []
    full_layers = ""
    if model.window_attn_skip_freq:
        full_layers = f", full attention in layers numbered k x {model.window_attn_skip_freq}"
    return [
        f"window           {counted(window, 'key')}: a token and the {window - 1} before it "
        f"({window - 1},0 in Megatron){full_layers}"
    ]


def _layout_description(setup: RunSettings) -> str:
    """Return the layout, with the stripe size and its reason where the ring has stripes."""
    layout = setup.layout
    if layout.name != "striped" or layout.ring_size == 1 == layout.stripe_size:
        return layout.name
    reason = f" (auto: {setup.stripe_reason})" if setup.stripe_reason else ""
    return f"striped, stripe size {layout.stripe_size}{reason}"


def _placement_line(layout: Layout) -> list[str]:
    if layout.placement is None:
        return []
    return [
        f"placement        in blocks of {layout.placement.block} tokens, of the samples whose "
        "documents are worth placing by size"
    ]


def _tokens_description(setup: RunSettings) -> str:
    seq_length = setup.config.data.seq_length
    padding = setup.layout.seq_length - seq_length
    tokens = counted(seq_length, "token")
    return (
        f"{tokens} and {counted(padding, 'padding token')} without a target" if padding else tokens
    )
