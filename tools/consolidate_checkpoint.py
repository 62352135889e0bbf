"""Writes a checkpoint to one safetensors file: the command line of checkpoint/single_file.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro

from megatron_ring.checkpoint.locate import locate, verify
from megatron_ring.checkpoint.single_file import TYPES, consolidate
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import ConfigError, reporting_errors

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Options:
    """Write the whole tensors of a checkpoint of any grid and ZeRO stage to one file.

    The tensors have the parameter names of this project's GPT. One tensor is in memory at a time,
    and the file gets its name once it is complete.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a checkpoint, or a --save folder, of which the latest checkpoint is used."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.safetensors")]
    """File to write, which must not exist. Its metadata has the step and the model's options."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "stored"
    """dtype of the tensors. A value that is too large for it is an error."""
    kind: Literal["weight", "exp_avg", "exp_avg_sq"] = "weight"
    """Which tensor of each parameter is written: itself, or one of Adam's two moments."""

    def problems(self) -> list[str]:
        """Return every invalid option, each with its remedy."""
        problems = []
        if self.file.suffix != _SUFFIX:
            nearest = self.file.with_suffix(_SUFFIX)
            problems.append(f"file {self.file} must end in {_SUFFIX}. Nearest: {nearest}.")
        if self.file.exists():
            problems.append(
                f"file {self.file} already exists. Set FILE to another path, or move the file away."
            )
        return problems


def run(options: Options) -> str:
    """Verify every byte of the checkpoint and write the file; returns a line for the user.

    Raises ConfigError and CheckpointError.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    path = locate(options.checkpoint).path
    verify(path)
    size = consolidate(Summary.of(path), options.file, options.kind, TYPES.get(options.dtype))
    return f"{options.file}: {size:,} bytes, the {options.kind} of every parameter of {path}."


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with the error's exit code after printing its message."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments)
        print(run(options))


if __name__ == "__main__":
    main()
