"""tools/generate.py from the command line: ranks, streams, JSON lines, dry run and errors."""

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from megatron_ring.config import DataConfig
from megatron_ring.errors import CheckpointError, ConfigError, DataError
from megatron_ring.inference.console import JsonLines
from tests.checkpoint import hugging_face_models
from tests.forked import Forked
from tests.inference import models
from tests.programs import ROOT, free_port

PROGRAM = ROOT / "tools" / "generate.py"
LENGTH = 160
PROMPTS = ["def fibonacci(n):", "a", "größe = ☃"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in ``runs`` with its tokenizer, prompts, and a Hugging Face model in ``hf``."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = models.write_tokenizer(folder / "store")
    gpt = models.random_model(vocab_size=models.TOKENIZER_IDS, length=LENGTH)
    data = DataConfig(seq_length=LENGTH, data_path=("store/tokens",))
    models.write_checkpoint(folder / "runs", gpt, data=data, seq_length=LENGTH)
    rows = [{"prompt": text, "id": number} for number, text in enumerate(PROMPTS)]
    lines = [json.dumps(row) for row in rows]
    (folder / "in.jsonl").write_text("\n".join([*lines[:2], "", lines[2]]))
    (folder / "book.txt").write_text(PROMPTS[2])
    (folder / "empty.txt").write_text("")
    (folder / "replaced.jsonl").write_text('{"prompt": "a", "text": "the expected one"}')
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    llama = hugging_face_models.CASES["llama"]
    wide = llama._replace(options=llama.options | {"vocab_size": models.TOKENIZER_IDS})
    hugging_face_models.save(wide, folder / "hf")
    (folder / "hf" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def run(folder: Path, arguments: list[str], ranks: int = 1) -> list[tuple[int, str, str]]:
    """Return the exit code, stdout and stderr of each rank."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    programs = [
        Forked(
            [str(PROGRAM), *arguments],
            folder,
            environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    outputs = [program.communicate(timeout=120) for program in programs]
    return [(program.returncode, *output) for program, output in zip(programs, outputs)]


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


BASE = ["--load", "runs", "--dtype", "fp32", "--max-new-tokens", "24"]
SAMPLED = "--temperature 1.2 --top-k 50 --top-p 0.97 --seed 9"


def test_json_lines_are_the_same_on_any_number_of_ranks(folder):
    base = [*BASE, "--prompts-jsonl", "in.jsonl"]
    found = {}
    for name, flags, ranks in (
        ("one", "", 1),
        ("two", "--batch-size 2 --prefill-chunk-size 3", 2),
        ("tensor", "--tensor-model-parallel-size 2 --batch-size 3", 2),
    ):
        flags = [*flags.split(), *SAMPLED.split(), "--output", f"{name}.jsonl"]
        outputs = run(folder, [*base, *flags], ranks)
        assert [code for code, _, _ in outputs] == [0] * ranks, outputs
        assert [out for _, out, _ in outputs] == [""] * ranks
        assert ["decode" in error for _, _, error in outputs] == [True] + [False] * (ranks - 1)
        found[name] = rows((folder / f"{name}.jsonl").read_text())
    assert found["one"] == found["two"] == found["tensor"]
    assert [row["prompt"] for row in found["one"]] == PROMPTS
    assert [row["id"] for row in found["one"]] == [0, 1, 2]
    for row in found["one"]:
        assert row["new_tokens"] == len(row["token_ids"])
        assert (row["new_tokens"] == 24) == (row["stop_reason"] == "length")
        assert row["text"]


def test_text_is_streamed_and_equals_that_in_json(folder):
    ((code, text, error),) = run(folder, [*BASE, "--prompt-file", "book.txt"])
    assert code == 0, error
    assert "prefill" in error
    ((code, out, _),) = run(folder, [*BASE, "--prompts-jsonl", "in.jsonl"])
    assert code == 0
    last = rows(out)[2]
    assert text == last["text"] + "\n"


@torch.no_grad()
def test_a_hugging_face_folder_gives_the_tokens_of_transformers(folder):
    flags = [*BASE[2:4], "--max-new-tokens", "16", "--prepend-bos", "off"]
    outputs = run(folder, ["--load", "hf", *flags, "--prompts-jsonl", "in.jsonl"], ranks=2)
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    found = rows(outputs[0][1])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, local_files_only=True
    )
    tokenizer = models.tokenizer()
    for row in found:
        prompt = torch.tensor([tokenizer.encode(row["prompt"])])
        expected = model.generate(prompt, max_new_tokens=16, do_sample=False)
        ending = [model.config.eos_token_id] if row["stop_reason"] == "end of document" else []
        assert row["token_ids"] + ending == expected[0, prompt.shape[1] :].tolist()
    assert {row["stop_reason"] for row in found} == {"end of document", "length"}


def test_a_dry_run_shows_the_memory_of_a_rank_and_starts_nothing(folder):
    ((code, out, _),) = run(folder, [*BASE, "--dry-run", "--world-size", "4"])
    assert code == 0
    # 2 layers, keys and values of 2 heads of 8 in 4 bytes, for a quarter of 159 tokens.
    assert f"cache          {2 * 2 * 2 * 8 * 4 * 40 / 1024:.2f} KiB" in out
    assert "4 ring x 1 tensor" in out
    assert f"{LENGTH} positions" in out


@pytest.mark.parametrize(
    ("flags", "kind", "parts"),
    [
        ("--load runs", ConfigError, ["--prompt-file"]),
        ("--prompt a", ConfigError, ["--load"]),
        ("--load runs --prompt a --prompt-file b", ConfigError, ["prompt and prompt_file"]),
        ("--load runs --prompt-file empty.txt", ConfigError, ["empty", "--prompt"]),
        ("--load runs --prompts-jsonl bad.jsonl", DataError, ["line 2", "prompt"]),
        ("--load runs --prompt-file missing.txt", DataError, ["--prompt-file"]),
        ("--load runs --prompt a --top-k 3", ConfigError, ["--temperature", "--top-k"]),
        (
            "--load runs --prompt a --max-new-tokens 160",
            ConfigError,
            ["161, more than the model's 160", "--max-new-tokens to at most 159", "--seq-length"],
        ),
        (
            "--load hf --prompt a --seq-length 4",
            ConfigError,
            ["at most 3, or --seq-length to at least 129"],
        ),
        ("--load runs --prompts-jsonl replaced.jsonl", DataError, ["line 1", "'text'", "rename"]),
        ("--load store --prompt a", CheckpointError, ["neither a checkpoint"]),
        ("--load runs --prompt a --output book.txt", ConfigError, ["book.txt exists", "--output"]),
        ("--load runs --prompt a --batch-size 2", ConfigError, ["--batch-size 1"]),
        (
            "--load hf --seq-length 4000000000 --prompt a --max-new-tokens 2000000000",
            ConfigError,
            ["seq_length"],
        ),
        (
            "--load hf --seq-length 2000000000 --prompt a --max-new-tokens 1999999990",
            ConfigError,
            ["free", "tokens fits", "--max-new-tokens"],
        ),
    ],
)
def test_bad_input_is_one_error_before_anything_is_loaded(folder, flags, kind, parts):
    ((code, out, error),) = run(folder, flags.split())
    assert code == kind.exit_code, error
    assert out == ""
    assert error.count(f"{kind.__name__} on rank 0") == 1
    assert "Traceback" not in error
    assert all(part in error for part in parts), error


def test_an_error_is_printed_by_one_rank(folder):
    outputs = run(folder, ["--load", "runs", "--prompt-file", "empty.txt"], ranks=2)
    assert [code for code, _, _ in outputs] == [ConfigError.exit_code] * 2
    assert "empty" in outputs[0][2]
    assert "empty" not in outputs[1][2]


def end_with_error(path: Path, written: list[dict]) -> None:
    with JsonLines(str(path)) as writer:
        for row in written:
            writer.write(row)
        raise CheckpointError("the weights cannot be read")


def test_the_output_is_created_with_its_first_line(tmp_path):
    path = tmp_path / "out.jsonl"
    with JsonLines(str(path)) as writer:
        assert not path.exists()  # a signal would leave nothing
        writer.write({"text": "a"})
        assert rows(path.read_text()) == [{"text": "a"}]
    with pytest.raises(ConfigError, match="--output"):
        JsonLines(str(path))
    with pytest.raises(DataError, match="--output"):
        JsonLines(str(tmp_path / "missing" / "out.jsonl"))


def test_an_output_on_a_full_disk_keeps_its_complete_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with JsonLines(str(path)) as writer:
            writer.write({"text": "a"})
            with pytest.raises(DataError, match="--output"):
                writer.write({"text": "b" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rows(path.read_text()) == [{"text": "a"}]


def test_after_an_error_the_output_has_the_complete_lines_only(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(CheckpointError):
        end_with_error(path, [])
    assert not path.exists()
    with pytest.raises(CheckpointError):
        end_with_error(path, [{"text": "größe"}])
    assert rows(path.read_text()) == [{"text": "größe"}]
