"""Import and export of Hugging Face transformers checkpoints.

    python tools/convert_checkpoint.py import HF_DIR OUT
    python tools/convert_checkpoint.py import HF_DIR OUT --rope-scaling yarn --seq-length 131072
    python tools/convert_checkpoint.py export CHECKPOINT HF_DIR --tokenizer DIR

Supports Llama, Mistral, Qwen 2, Qwen 3 and GPT-2. Every tensor is converted exactly, or the
conversion is refused with the reasons. transformers itself is not needed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import torch
import tyro

from megatron_ring.checkpoint.hugging_face.exporting import (
    Exported,
    ExportOptions,
    export_checkpoint,
)
from megatron_ring.checkpoint.hugging_face.folder import CARRIED
from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.special_tokens import GENERATION, SpecialTokens
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from megatron_ring.checkpoint.store import CONFIG
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.config import ModelConfig
from megatron_ring.errors import counted, reporting_errors


@dataclass(frozen=True)
class Import:
    """Import HF_DIR, a transformers model, into OUT, a folder for --load."""

    hf_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HF_DIR")]
    """Folder with config.json and safetensors files, as written by save_pretrained."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the checkpoint, which must be new or empty."""
    stretch: Annotated[Stretch, tyro.conf.OmitArgPrefixes] = field(default_factory=Stretch)


@dataclass(frozen=True)
class Export:
    """Export CHECKPOINT, written on any grid, into HF_DIR, a folder for transformers."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a checkpoint, or a --save folder, of which the newest checkpoint is used."""
    hf_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HF_DIR")]
    """Folder for the model, which must be new or empty."""
    export: Annotated[ExportOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=ExportOptions
    )


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def run_import(command: Import) -> None:
    """Import a model and print the result and the next steps.

    Raises CheckpointError and ConfigError.
    """
    imported = import_folder(command.hf_dir, command.out, command.stretch)
    stored = Summary.of(imported.path)
    dtypes = _describe_dtypes({stored.tensors.dtype(name) for name in stored.tensors.shapes})
    print(f"{imported.path}: {imported.family}, {stored.parameters:,} parameters in {dtypes}")
    sizes = f"vocab_size {stored.state.vocab_size:,}, seq_length {stored.state.seq_length:,}"
    print(f"{sizes}, {_describe_positions(stored.config.model)}")
    copied = ", ".join(imported.carried) or "no tokenizer, the folder has none"
    print(f"copied to {CARRIED}/: {copied}")
    if imported.dropouts:
        print(f"not imported: {', '.join(imported.dropouts)}; dropout is not supported")
    for note in imported.notes:
        print(note)
    for name in {"tokenizer.json", "tokenizer.model"}.intersection(imported.carried):
        tokenizer = imported.path / CARRIED / name
        print(f"to prepare data: tools/prepare_data.py --tokenizer-model {tokenizer}")
    config = imported.path / CONFIG
    print(f"to train: pretrain_gpt.py --config {config} --load {command.out}")


def _describe_dtypes(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _describe_positions(model: ModelConfig) -> str:
    if model.position_embedding_type != "rope":
        return "learned positions"
    if model.rope_scaling == "none":
        return f"RoPE base {model.rotary_base:g}"
    scaling = f"{model.rope_scaling} x {model.rope_scaling_factor:g}"
    return f"RoPE base {model.rotary_base:g}, {scaling}"


def run_export(command: Export) -> None:
    """Export a checkpoint and print the result.

    Raises CheckpointError, and ConfigError for an invalid shard size.
    """
    exported = export_checkpoint(command.checkpoint, command.hf_dir, command.export)
    if exported.checkpoint.note:
        print(exported.checkpoint.note)
    dtypes = _describe_dtypes(exported.dtypes)
    print(
        f"{command.hf_dir}: {exported.checkpoint.path} as {exported.family} in {dtypes}, "
        f"{counted(len(exported.files), 'file')}"
    )
    print(f"family {exported.family}: {exported.reason}")
    print(f"longest sequence, as trained or after RoPE scaling: {exported.longest:,} tokens")
    print(_describe_end_of_text(exported.special))
    print(f"tokenizer and generation_config.json: {_describe_other_files(exported)}")


def _describe_other_files(exported: Exported) -> str:
    """Return the names of the files copied or written beside the model, or the flag to set."""
    written = [GENERATION] if GENERATION in exported.files else []
    if exported.carried:
        return ", ".join(exported.carried + written)
    present = f"{GENERATION} only" if written else "none"
    return f"{present}; the checkpoint has no tokenizer. Set --tokenizer to a folder with one"


def _describe_end_of_text(special: SpecialTokens) -> str:
    if not special.source:
        return (
            "eos_token_id is unknown, so generation stops only at its length limit. "
            "Set --tokenizer to a folder that has it"
        )
    return f"eos_token_id {special.ids['eos_token_id']}, from {special.source}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with the error's exit code after printing its message."""
    with reporting_errors():
        command = tyro.cli(Command, args=arguments, description=__doc__)
        {Import: run_import, Export: run_export}[type(command)](command)


if __name__ == "__main__":
    main()
