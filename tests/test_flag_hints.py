"""Hints for flags of Megatron and transformers: shown with the error, and naming existing flags."""

import re
from dataclasses import fields, is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from megatron_ring.config import Config, load_yaml, parse
from megatron_ring.errors import ConfigError
from megatron_ring.flag_hints import MEGATRON, MEGATRON_PREFIXES, PREPROCESS, TRAINER, hint
from tools import prepare_data

OPTIONS = {
    option.name.replace("_", "-"): get_type_hints(section.type)[option.name]
    for section in fields(Config)
    if is_dataclass(section.type)
    for option in fields(section.type)
} | {
    option.name.replace("_", "-"): object
    for option in fields(Config)
    if not is_dataclass(option.type)
}
HINTS = MEGATRON | MEGATRON_PREFIXES | TRAINER


def test_no_flag_of_this_package_is_in_the_tables():
    assert not OPTIONS.keys() & (MEGATRON.keys() | TRAINER.keys())
    assert not MEGATRON.keys() & TRAINER.keys()
    prefixes = tuple(MEGATRON_PREFIXES)
    assert [option for option in OPTIONS if option.startswith(prefixes)] == []


@pytest.mark.parametrize("name", HINTS)
def test_every_hint_names_flags_and_values_that_exist(name):
    named = re.findall(r"--([a-z0-9-]+)(?: (\w+))?", HINTS[name])
    assert named or HINTS[name].startswith(("no equivalent", "leave it out", "set WANDB_"))
    for flag, value in named:
        assert flag in OPTIONS
        choices = get_args(OPTIONS[flag]) if get_origin(OPTIONS[flag]) is Literal else ()
        # The word after a flag is a value only where the hint begins with "set --FLAG VALUE".
        if choices and HINTS[name].startswith(f"set --{flag} {value}"):
            assert value in map(str, choices)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--swiglu"], "Megatron's --swiglu: set --activation swiglu"),
        (["--num-layers", "2", "--bf16", "--lr", "1"], "Megatron's --bf16: set --dtype bf16"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-model"),
        (["--lr-decay-samples", "100"], "set --lr-decay-iters"),
        (["--use-mcore-models"], "Megatron's --use-mcore-models: leave it out"),
        (["--cp-comm-type", "a2a"], "--ulysses-degree"),
        (["--use_flash_attn"], "--attention-kernel flash"),
        (["--rotary-percent=0.5"], "Megatron's --rotary-percent: no equivalent"),
        (["--moe-router-topk", "2"], "no mixture of experts"),
        (["--learning_rate", "1e-3"], "transformers' --learning_rate: set --lr"),
    ],
)
def test_an_unknown_flag_ends_with_exit_code_2_and_the_hint(arguments, expected, capsys):
    with pytest.raises(SystemExit) as exit_request:
        parse(arguments)
    assert exit_request.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_every_unknown_flag_has_its_hint_and_only_one_rank_prints_them(capsys):
    with pytest.raises(SystemExit):
        parse(["--swiglu", "--bf16", "--swiglu"])
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Megatron's")]
    assert [line.split(":")[0] for line in hints] == ["Megatron's --swiglu", "Megatron's --bf16"]
    with pytest.raises(SystemExit):
        parse(["--swiglu"], console=False)
    assert "Megatron" not in capsys.readouterr().err


def test_prepare_data_hints_at_flags_of_megatrons_preprocess_data(capsys):
    arguments = ["--input", "x", "--output-prefix", "p", "--append-eod", "--json-keys", "text"]
    with pytest.raises(SystemExit) as exit_request:
        prepare_data.main(arguments)
    assert exit_request.value.code == 2
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Megatron's")]
    assert sorted(hints) == [
        f"Megatron's --{name}: {PREPROCESS[name]}." for name in ("append-eod", "json-keys")
    ]
    options = {option.name.replace("_", "-") for option in fields(prepare_data.Options)}
    assert not options & PREPROCESS.keys()
    assert set(re.findall(r"--([a-z0-9-]+)", " ".join(PREPROCESS.values()))) <= options


def test_other_unknown_flags_have_no_hint(capsys):
    assert hint("--unheard-of") == hint("") == ""
    with pytest.raises(SystemExit) as exit_request:
        parse(["--unheard-of"])
    assert exit_request.value.code == 2
    with pytest.raises(SystemExit) as exit_request:
        parse(["--help"])
    assert exit_request.value.code == 0
    assert "Megatron's --" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "key",
    [
        "model: {swiglu: true}",
        "training: {bf16: true}",
        "swiglu: true",
        "model: {moe_grouped_gemm: 1}",
    ],
)
def test_a_yaml_key_has_the_same_hint(key, tmp_path):
    (tmp_path / "config.yaml").write_text(key)
    with pytest.raises(ConfigError, match="Megatron's (swiglu|bf16|moe_grouped_gemm): "):
        load_yaml(tmp_path / "config.yaml")
