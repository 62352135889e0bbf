"""One safetensors file of whole tensors from a checkpoint: a command line over checkpoint/single_file.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_ring.checkpoint.locate import locate, verify
from megatron_ring.checkpoint.single_file import TYPES, consolidate
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import ConfigError, reporting_errors

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Options:
    """Write the whole tensors of a checkpoint of any grid and ZeRO stage to one file, under our names for them.

    One tensor is in memory at a time, and the file has its name once it is whole.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The folder of a checkpoint, or one given as --save: then the checkpoint that latest names."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.safetensors")]
    """The file to write, which must not be there yet. Its metadata has the model's options as JSON, and the step."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "stored"
    """The type of its tensors. A value that is too large for it is an error."""
    kind: Literal["weight", "exp_avg", "exp_avg_sq"] = "weight"
    """What of each parameter is written: itself, or one of Adam's two moments."""

    def problems(self) -> list[str]:
        """What cannot be met, each with its remedy."""
        found = []
        if self.file.suffix != _SUFFIX:
            found.append(
                f"file {self.file} must end in {_SUFFIX}. Nearest: {self.file.with_suffix(_SUFFIX)}."
            )
        if self.file.exists():
            found.append(
                f"file {self.file} is there already. Give FILE another name, or move it away."
            )
        return found


def run(options: Options) -> str:
    """Check every byte of the checkpoint and write the file; what was done. Raises ConfigError, CheckpointError."""
    if problems := options.problems():
        raise ConfigError(problems)
    path = locate(options.checkpoint).path
    verify(path)
    size = consolidate(Summary.of(path), options.file, options.kind, TYPES.get(options.dtype))
    return f"{options.file}: {size:,} bytes, the {options.kind} of every parameter of {path}."


def main(arguments: list[str] | None = None) -> None:
    """Leaves with the exit code of the error whose message was printed."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments, description=Options.__doc__)
        print(run(options))


if __name__ == "__main__":
    main()
