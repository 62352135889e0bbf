"""Checkpoints of Hugging Face's transformers, in and out.

    python tools/convert_checkpoint.py import HF_DIR OUT
    python tools/convert_checkpoint.py import HF_DIR OUT --rope-scaling yarn --seq-length 131072
    python tools/convert_checkpoint.py export CHECKPOINT HF_DIR --tokenizer DIR

Llama, Mistral, Qwen 2, Qwen 3 and GPT-2, every tensor exactly, or refused with the reasons. transformers itself is not
needed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

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
from megatron_ring.errors import reporting_errors


@dataclass(frozen=True)
class Import:
    """Write OUT, a folder that --load takes, from HF_DIR, a folder of config.json and safetensors files."""

    hf_dir: Annotated[Path, tyro.conf.Positional]
    """What transformers' save_pretrained has written."""
    out: Annotated[Path, tyro.conf.Positional]
    """A folder that is not there yet, or empty."""
    stretch: Annotated[Stretch, tyro.conf.OmitArgPrefixes] = field(default_factory=Stretch)


@dataclass(frozen=True)
class Export:
    """Write HF_DIR, a folder that transformers loads, from CHECKPOINT, whatever processes wrote that."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The folder of a checkpoint, or a --save folder: then its newest."""
    hf_dir: Annotated[Path, tyro.conf.Positional]
    """A folder that is not there yet, or empty."""
    form: Annotated[ExportOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ExportOptions)


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def run_import(options: Import) -> None:
    """Import, and tell what came of it and how to go on. Raises CheckpointError, ConfigError."""
    done = import_folder(options.hf_dir, options.out, options.stretch)
    stored = Summary.of(done.path)
    types = _named({stored.tensors.dtype(name) for name in stored.tensors.shapes})
    print(f"{done.path}: {done.family}, {stored.parameters:,} parameters in {types}")
    sizes = f"vocab_size {stored.state.vocab_size:,}, seq_length {stored.state.seq_length:,}"
    print(f"{sizes}, RoPE {_rope(stored.config.model)}")
    print(
        f"carried along in {CARRIED}/: {', '.join(done.carried) or 'no tokenizer, there was none'}"
    )
    if done.dropouts:
        print(f"not carried along: {', '.join(done.dropouts)}; the models here have no dropout")
    for note in done.notes:
        print(note)
    for tokenizer in {"tokenizer.json", "tokenizer.model"}.intersection(done.carried):
        print(
            f"prepare text for it with: tools/prepare_data.py --tokenizer-model {done.path / CARRIED / tokenizer}"
        )
    print(f"train it with: pretrain_gpt.py --config {done.path / CONFIG} --load {options.out}")


def _named(types: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))


def _rope(model: ModelConfig) -> str:
    if model.position_embedding_type != "rope":
        return "none, positions are learned"
    stretch = (
        f", {model.rope_scaling} x {model.rope_scaling_factor:g}"
        if model.rope_scaling != "none"
        else ""
    )
    return f"of base {model.rotary_base:g}{stretch}"


def run_export(options: Export) -> None:
    """Export, and tell what came of it. Raises CheckpointError, and ConfigError for a size that is none."""
    done = export_checkpoint(options.checkpoint, options.hf_dir, options.form)
    if done.checkpoint.note:
        print(done.checkpoint.note)
    print(
        f"{options.hf_dir}: {done.checkpoint.path} as {done.family} in {_named(done.dtypes)}, {len(done.files)} files"
    )
    print(f"family {done.family}: {done.reason}")
    print(
        f"its longest sequence, by how it was trained or stretched, is of {done.longest:,} tokens"
    )
    print(_ends(done.special))
    print(f"tokenizer and generation_config.json: {_beside(done)}")


def _beside(done: Exported) -> str:
    """Return the names of the files that were copied or made beside the model, and what to set without any copied."""
    made = [GENERATION] if GENERATION in done.files else []
    if done.carried:
        return ", ".join(done.carried + made)
    found = "generation_config.json alone" if made else "none"
    return f"{found}, the checkpoint has no tokenizer. Set --tokenizer to the folder of one to have it there"


def _ends(special: SpecialTokens) -> str:
    if not special.source:
        return "eos_token_id is not known, so generation ends at its length alone. Set --tokenizer to have it there"
    return f"eos_token_id {special.ids['eos_token_id']}, from {special.source}"


def main(arguments: list[str] | None = None) -> None:
    """Leaves with the exit code of the error whose message was printed."""
    with reporting_errors():
        command = tyro.cli(Command, args=arguments, description=__doc__)
        {Import: run_import, Export: run_export}[type(command)](command)


if __name__ == "__main__":
    main()
