"""A run in words: what was settled and why before it starts, its plan for --dry-run, its summary at the end."""

from pathlib import Path

from megatron_ring.checkpoint import names
from megatron_ring.checkpoint.fit import changed_stores, other_data
from megatron_ring.checkpoint.store import Stored, read_config
from megatron_ring.config import Config, DataConfig, ModelConfig, to_yaml
from megatron_ring.data.fingerprint import Fingerprint
from megatron_ring.engine.engine import Engine
from megatron_ring.monitoring.metrics import ConsoleReport
from megatron_ring.monitoring.plot import draw_loss
from megatron_ring.monitoring.ring_profile import watch as ring_profile
from megatron_ring.plan.device_peaks import peak_flops
from megatron_ring.plan.dry_run import plan_lines
from megatron_ring.plan.parameters import parameter_count
from megatron_ring.settings.setup import Setup
from megatron_ring.training.schedule import change_on_resume
from megatron_ring.training.start import Start


def opening(start: Start) -> str:
    """What is said before the model is built."""
    setup, dataset, stored = start.setup, start.dataset, start.stored
    config, token_ids, rows = setup.config, dataset.tokenizer.vocab_size, start.vocab_size
    parameters = parameter_count(config.model, rows, config.data.seq_length)
    lines = [
        *_chosen(setup),
        f"model            {parameters:,} parameters, {token_ids} token ids"
        + f" in {rows} rows" * (rows > token_ids),
        *(f"data             {line}" for line in dataset.training.in_words()),
    ]
    if stored:
        lines += [*stored.skipped, *_beginning(stored, config, start.fingerprints)]
    elif earlier := _earlier_checkpoints(config):
        lines.append(
            f"starting afresh  {earlier[0]} is of an earlier run. The first save of this one moves the "
            f"{len(earlier)} checkpoints there into a sub-folder; --load {config.checkpoint.save} continues that run"
        )
    elif config.checkpoint.load:
        lines.append(
            f"starting afresh  load {config.checkpoint.load} holds no checkpoint yet: weights are random"
        )
    return "\n".join(lines)


def _earlier_checkpoints(config: Config) -> list[Path]:
    """The checkpoints in the --save folder of a run that starts from step 0, newest first."""
    return names.checkpoints(Path(config.checkpoint.save)) if config.checkpoint.save else []


def _beginning(stored: Stored, config: Config, fingerprints: list[Fingerprint]) -> list[str]:
    """What the run goes on from; data that is not the checkpoint's is no fault, but is never taken in silence."""
    if stored.state.step == 0:
        return [f"weights          {stored.path}, a new run"]
    step = stored.state.step
    lines = [f"resuming         {stored.path}, {step} steps done"]
    folders, path = config.checkpoint, stored.path.absolute()
    is_named_itself = path == Path(folders.load).absolute()
    if folders.save and is_named_itself and path.parent == Path(folders.save).absolute():
        lines.append(
            f"load             names a checkpoint of --save: the same command started again goes back to step {step}. "
            f"--load {folders.save} continues from the newest"
        )
    if step >= config.training.train_iters:
        lines.append(
            f"nothing to do    --train-iters is {config.training.train_iters}: set it above {step} to train on"
        )
    if changed := change_on_resume(step, read_config(stored.path).training, config.training):
        lines.append(f"learning rate    {changed}")
    other_stores = changed_stores(stored, fingerprints)
    differing = other_data(stored, config)
    if len(fingerprints) == 1 and stored.state.data and not other_stores:
        # The same store under another path.
        differing = [
            difference for difference in differing if not difference.startswith("data_path ")
        ]
    if differing := [*differing, *other_stores]:
        goes_on = f"it goes on at sample {stored.state.consumed_samples:,}, which may be another text than there"
        stated = "; ".join(problem.removesuffix(".") for problem in differing)
        lines.append(f"other data       {stated}: {goes_on}, read before or not.")
    return lines


def report(start: Start, engine: Engine) -> ConsoleReport:
    """Where rank 0's steps are told. Measures what this device could reach, where no data sheet says it."""
    setup, config = start.setup, start.setup.config
    peak, source = peak_flops(setup.device, setup.precision.dtype)
    print(
        f"peak             {f'{peak / 1e12:.4g} TFLOP/s a process, {source}' if peak else source}"
    )
    return ConsoleReport(
        config.logging,
        steps=range(start.state.step + 1, config.training.train_iters + 1),
        peak_flops=peak * setup.grid.world_size if peak else None,
        monitors=engine.monitors,
    )


def closing(report: ConsoleReport, config: Config, saved: Path | None) -> str:
    """The summary, and where everything is. Draws the loss beside the metrics file; a plot that
    fails is a warning.
    """
    lines = [report.close()]
    if saved:
        lines.append(f"checkpoint       {saved}")
    if config.logging.metrics_file:
        metrics = Path(config.logging.metrics_file)
        lines.append(f"metrics          {metrics}")
        if report.first and metrics.is_file():  # and not a device or a pipe, which may have no end
            picture = metrics.with_name("loss.png")
            if report.best_effort(f"loss plot {picture}", draw_loss, metrics, picture):
                lines.append(f"loss plot        {picture}")
    return "\n".join(line for line in lines if line)


def plan(setup: Setup) -> str:
    """All that --dry-run prints: the config, what was chosen, where everything goes and what it costs."""
    return "\n".join([to_yaml(setup.config), *_chosen(setup), *plan_lines(setup)])


def _chosen(setup: Setup) -> list[str]:
    """What was settled for the user, each with its reason."""
    grid, layout = setup.grid, setup.layout
    return [
        f"grid             {grid.world_size} processes = {grid.pipe} pipe x {grid.data} data x {grid.context} context "
        f"({grid.ring} ring x {grid.ulysses} ulysses) x {grid.tensor} tensor",
        f"layout           {_layout_in_words(setup)}, {_tokens_in_words(setup)}, "
        f"{layout.shard_length} on each ring rank",
        f"global batch     {setup.global_batch_size} sequences, {setup.micro_batches} micro-batches of "
        f"{setup.config.training.micro_batch_size} on each of {grid.data} data ranks",
        f"dtype            {setup.precision.name}: {setup.precision.reason}",
        f"attention        {setup.kernel.name}: {setup.kernel.reason}",
        *(f"operations       {line}" for line in setup.operations.in_words()),
        *_split_line(setup.config.data),
        *_window_line(setup.config.model),
        *ring_profile.in_words(setup),
    ]


def _split_line(data: DataConfig) -> list[str]:
    """What shares of another sum than 1 were taken for."""
    if data.split_adds_up_to_1:
        return []
    given, taken = (
        ", ".join(f"{share:.6g}" for share in shares) for shares in (data.split, data.shares)
    )
    return [f"split            {given} adds up to {sum(data.split):.6g}: shares of {taken}"]


def _window_line(model: ModelConfig) -> list[str]:
    """The window as it is counted here and in Megatron, whose pairs leave the token itself out."""
    window = model.window_size
    if not window:
        return []
    full = (
        f", fully in every {model.window_attn_skip_freq}th layer"
        if model.window_attn_skip_freq
        else ""
    )
    return [
        f"window           {window} keys: a token and the {window - 1} before it ({window - 1},0 in Megatron){full}"
    ]


def _layout_in_words(setup: Setup) -> str:
    layout = setup.layout
    if layout.stripe_size == 1:
        return layout.name
    auto = (
        f" (auto: {setup.kernel.name} likes these)"
        if setup.config.parallel.stripe_size == "auto"
        else ""
    )
    return f"{layout.name} by {layout.stripe_size}{auto}"


def _tokens_in_words(setup: Setup) -> str:
    seq_length = setup.config.data.seq_length
    filled = setup.layout.seq_length - seq_length
    return f"{seq_length} tokens" + (
        f" and {filled} more that fill the last row and count for nothing" if filled else ""
    )
