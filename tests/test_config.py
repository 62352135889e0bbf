"""Every option is a YAML key and a flag, and every illegal value names its rule and its flag."""

import ast
import contextlib
import inspect
import io
import math
import os
import re
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from itertools import pairwise

import pytest

from megatron_ring.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    load_yaml,
    parse,
    to_yaml,
)
from megatron_ring.errors import ConfigError
from tests.limited import limited

SECTIONS = [field.type for field in fields(Config) if is_dataclass(field.type)]


@pytest.fixture
def yaml(tmp_path):
    """A function that writes a config file and returns its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def error_of(yaml):
    """A function that returns the error message of a config file, with the path as FILE."""

    def read(text: str | bytes) -> str:
        path = yaml(text)
        with pytest.raises(ConfigError) as raised:
            load_yaml(path)
        return str(raised.value).replace(path, "FILE")

    return read


# ---- default < YAML < flag ----


def test_flags_override_the_file_and_the_file_overrides_defaults(yaml):
    path = yaml("training: {lr: 0.5, seed: 7}\nmodel: {num_layers: 9}")
    config = parse(["--config", path, "--seed", "8", "--hidden-size", "512"])
    assert (config.training.lr, config.model.num_layers) == (0.5, 9)
    assert (config.training.seed, config.model.hidden_size) == (8, 512)
    assert config.training.train_iters == TrainingConfig().train_iters
    assert config.config == path


def test_without_arguments_all_values_are_defaults():
    assert parse([]) == Config()


@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_the_file_may_be_given_with_an_equals_sign(yaml, spelling):
    assert parse(spelling.format(yaml("training: {seed: 7}")).split()).training.seed == 7


def test_flags_may_have_underscores_for_dashes():
    assert parse(["--seq_length", "77"]).data.seq_length == 77


def test_lists_can_be_given_as_flags_and_in_the_file(yaml):
    path = yaml("data: {data_path: store, split: [0.5, 0.5]}")
    assert load_yaml(path).data == DataConfig(data_path=("store",), split=(0.5, 0.5))
    config = parse(["--config", path, "--split", "0.9", "0.1", "--data-path", "other"])
    assert config.data == DataConfig(data_path=("other",), split=(0.9, 0.1))
    assert parse(["--config", path, "--split", "0.8", "0.1", "0.1"]).data.split == (0.8, 0.1, 0.1)


@pytest.mark.parametrize(
    "words", ["969,30,1", "969 30 1", "969, 30, 1", "969,30 1", "=969,30,1", "969.0,30.0,1.0"]
)
def test_shares_may_be_separated_by_commas_and_have_any_sum(words):
    flag = ["--split" + words] if words.startswith("=") else ["--split", *words.split()]
    data = parse([*flag, "--seed", "7"]).data
    assert data.split == (969.0, 30.0, 1.0)
    assert data.shares == (0.969, 0.03, 0.001)
    assert data.problems() == []


@pytest.mark.parametrize("text", ["[969, 30, 1]", "969,30,1", "'969, 30, 1'", "[969, 30.0, '1']"])
def test_shares_in_a_file_may_be_separated_by_commas(text, yaml):
    assert load_yaml(yaml(f"data:\n  split: {text}")).data.split == (969.0, 30.0, 1.0)


def test_shares_with_sum_1_are_not_normalized():
    assert DataConfig(split=(0.9, 0.0999995)).shares == (0.9, 0.0999995)
    assert DataConfig(split=(1, 1)).shares == (0.5, 0.5)


@pytest.mark.parametrize("words", ["1", "1,2,3,4", "", "a,b", "1 2 3 4"])
def test_other_than_two_or_three_numeric_shares_is_refused(words, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(["--split", *words.split()])
    assert raised.value.code == 2
    assert "split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("8", 8),
        ("1024,0", 1025),
        ("(1024,0)", 1025),
        ("1024,-1", 1025),
        ("-1,0", 0),
        ("-1,-1", 0),
        ("0,0", 1),
    ],
)
def test_a_window_may_be_megatrons_pair_which_excludes_the_token_itself(word, keys, yaml):
    bare = word.strip("()")
    for flags in (
        ["--window-size", word],
        [f"--window-size={word}"],
        ["--window-size", *bare.split(",")],
    ):
        assert parse([*flags, "--seed", "7"]).model.window_size == keys
    for text in (f"'{word}'", f"[{bare}]"):
        assert load_yaml(yaml(f"model: {{window_size: {text}}}")).model.window_size == keys


@pytest.mark.parametrize("words", ["1024,1", "-2,0", "1,2,3", "", "1.5", "1024,x"])
def test_a_window_with_tokens_after_or_of_other_form_is_refused(words, capsys, yaml):
    with pytest.raises(SystemExit) as raised:
        parse(["--window-size", *words.split()])
    assert raised.value.code == 2
    assert "window-size" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="window_size"):
        load_yaml(yaml(f"model: {{window_size: '{words}'}}"))


def test_self_test_without_a_value_means_only(yaml):
    assert parse([]).self_test == "start"
    assert parse(["--self-test"]).self_test == "only"
    assert parse(["--self-test", "--lr", "0.1"]).self_test == "only"
    path = yaml("self_test: none")
    assert parse(["--config", path]).self_test == "none"
    assert parse(["--config", path, "--self-test", "start"]).self_test == "start"


def test_a_blend_alternates_exact_weights_and_stores():
    blend = parse(["--data-path", "0.7", "a", "0.1", "b"]).data.blend
    assert blend == {"a": Fraction(7, 10), "b": Fraction(1, 10)}
    assert DataConfig(data_path=("0.7",)).blend == {"0.7": 1}
    assert DataConfig().blend == {}


def test_a_blend_in_a_file_is_a_list_of_strings(yaml):
    written = parse(["--data-path", "0.7", "a", "0.3", "b", "--packing", "best-fit"])
    assert load_yaml(yaml(to_yaml(written))) == written


def test_scientific_notation_without_a_point_is_a_number(yaml):
    """YAML reads 3e-4 as text."""
    assert load_yaml(yaml("training: {lr: 3e-4, min_lr: 1}")).training == TrainingConfig(
        lr=3e-4, min_lr=1.0
    )
    assert load_yaml(yaml("training: {lr: 3e-4, min_lr: 3e-5}")).training.min_lr == 3e-5
    assert load_yaml(yaml("training: {min_lr: auto}")).training.min_lr == "auto"


@pytest.mark.filterwarnings("error")
def test_deepspeed_keys_come_from_the_file_only_and_are_unchanged(yaml):
    """Although some share names with flags and with each other."""
    extra = "{tensorboard: {enabled: true}, lr: 5, csv_monitor: {enabled: true}}"
    config = parse(["--config", yaml(f"training: {{deepspeed: {extra}}}"), "--lr", "7"])
    assert config.training.lr == 7.0
    assert config.training.deepspeed == {
        "lr": 5,
        "tensorboard": {"enabled": True},
        "csv_monitor": {"enabled": True},
    }


def test_an_empty_file_means_defaults(yaml):
    assert load_yaml(yaml("")) == Config()


# ---- every option has help ----


def documented(section: type) -> dict[str, str]:
    """Return the docstring under every field of a dataclass."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    return {
        statement.target.id: text.value.value
        for statement, text in pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def words(text: str) -> str:
    """Reduce a text to letters and digits, which line breaks and boxes around it do not change."""
    return re.sub(r"[\W_]", "", text)


@pytest.fixture(scope="module")
def help_text() -> str:
    """The output of --help."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as raised:
        parse(["--help"])
    assert raised.value.code == 0
    return printed.getvalue()


OPTIONS = [
    (section, field.name)
    for section in [*SECTIONS, Config]
    for field in fields(section)
    if not is_dataclass(field.type) and field.name != "deepspeed"
]


@pytest.mark.parametrize(("section", "name"), OPTIONS)
def test_every_option_is_a_flag_with_its_docstring_as_help(section, name, help_text):
    assert re.search(rf"--{name.replace('_', '-')}[ ,]", help_text)
    assert words(documented(section)[name]) in words(help_text)


def test_option_names_are_unique_over_all_sections():
    """Because flags do not name the section."""
    names = [field.name for section in [*SECTIONS, Config] for field in fields(section)]
    assert len(names) == len(set(names))


# ---- the resolved config ----


def test_the_resolved_config_can_be_read_again(tmp_path):
    resolved = parse(
        [
            "--lr",
            "3e-7",
            "--data-path",
            "store",
            "--context-parallel",
            "zigzag",
            "--add-bias-linear",
        ]
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(resolved))
    assert load_yaml(tmp_path / "resolved.yaml") == resolved


def test_the_resolved_config_keeps_deepspeed_keys(yaml):
    config = load_yaml(
        yaml("training: {deepspeed: {comms_logger: {enabled: true, prof_ops: [all_reduce]}}}")
    )
    assert load_yaml(yaml(to_yaml(config))) == config


def test_the_resolved_config_has_every_option_of_the_sections_only():
    resolved = to_yaml(replace(Config(), config="some.yaml", dry_run=True, self_test="none"))
    assert all(f"  {field.name}:" in resolved for section in SECTIONS for field in fields(section))
    assert "some.yaml" not in resolved
    assert "dry_run" not in resolved
    assert "self_test" not in resolved


# ---- errors in a file ----

# Content of a file -> parts of its error message.
FILE_ERRORS = {
    "modle: {num_layers: 2}": ["FILE: ", "'modle'", "model?"],
    "model: {num_layer: 2}": ["FILE: model: ", "'num_layer'", "num_layers?"],
    "model: {lr: 2}": ["FILE: model: ", "'lr'", "training.lr?"],
    "seq_lenght: 2": ["FILE: ", "'seq_lenght'", "data.seq_length?"],
    "checkpoint: {xyzzy: 2}": [
        "FILE: checkpoint: ",
        "'xyzzy'",
        "save, load, finetune, allow_other_data, save_interval, async_save, keep_last, keep_every.",
    ],
    "1: 2": [
        "FILE: ",
        "key 1.",
        "model, parallel, data, training, memory, checkpoint, guards, logging, config, dry_run, "
        "self_test.",
    ],
    "model: 3": ["FILE: model: ", "keys and values", "3."],
    "[a, b]": ["FILE: ", "keys and values", "['a', 'b']."],
    "model: {num_layers: 2.0}": ["FILE: model: num_layers is 2.0", "int."],
    "model: {num_layers: true}": ["FILE: model: num_layers is True", "int."],
    "model: {add_bias_linear: 1}": ["FILE: model: add_bias_linear is 1", "bool."],
    "model: {softmax_type: off}": [
        "FILE: model: softmax_type is False",
        "vanilla, off-by-one, learnable.",
    ],
    "training: {lr: fast}": ["FILE: training: lr is 'fast'", "float."],
    "training: {lr: true}": ["FILE: training: lr is True", "float."],
    "training: {lr: [1]}": ["FILE: training: lr is [1]", "float."],
    "training: {dtype: bf15}": ["FILE: training: dtype is 'bf15'", "auto, fp32, bf16, fp16."],
    "training: {min_lr: low}": ["FILE: training: min_lr is 'low'", "float", "auto."],
    "training: {min_lr: true}": ["FILE: training: min_lr is True", "auto."],
    "training: {min_lr: -.inf}": ["FILE: min_lr -inf ", "finite"],
    "training: {lr_warmup_iters: some}": [
        "FILE: training: lr_warmup_iters is 'some'",
        "int",
        "auto.",
    ],
    "training: {zero_stage: true}": ["FILE: training: zero_stage is True", "0, 1, 2, 3."],
    "training: {zero_stage: 1.0}": ["FILE: training: zero_stage is 1.0", "0, 1, 2, 3."],
    "training: {zero_stage: [1]}": ["FILE: training: zero_stage is [1]", "0, 1, 2, 3."],
    "training: {deepspeed: 3}": ["FILE: training: deepspeed is 3", "dict."],
    "parallel: {stripe_size: true}": ["FILE: parallel: stripe_size is True", "auto."],
    "parallel: {stripe_size: wide}": ["FILE: parallel: stripe_size is 'wide'", "auto."],
    "data: {split: [1]}": ["FILE: data: split is [1]", "2 float", "3 float"],
    "data: {split: {0.9: a, 0.1: b}}": [
        "FILE: data: split is {0.1: 'b', 0.9: 'a'}",
        "2 float",
        "3 float",
    ],
    "data: {split: 0.9}": ["FILE: data: split is 0.9", "2 float", "3 float"],
    "data: {data_path: [3]}": ["FILE: data: data_path is [3]", "str."],
    "checkpoint: {save: 3}": ["FILE: checkpoint: save is 3", "str."],
}


@pytest.mark.parametrize("text", FILE_ERRORS)
def test_an_error_in_a_file_names_the_key_the_value_and_what_is_legal(text, error_of):
    [line] = error_of(text).splitlines()
    first, *others = FILE_ERRORS[text]
    assert line.startswith(first)
    assert all(part in line for part in others)


def test_all_errors_in_a_file_are_reported_together(error_of):
    text = ["model: {num_layers: two}", "training: {lr: fast}", "data: {split: [1]}"]
    num_layers, lr, split = error_of("\n".join(text)).splitlines()
    assert num_layers.startswith("FILE: model: num_layers is 'two'")
    assert lr.startswith("FILE: training: lr is 'fast'")
    assert split.startswith("FILE: data: split is [1]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [b", "while parsing"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode"),
        (
            "training: {lr: 0.1}\ntraining: {train_iters: 50}",
            "'training' is twice in one mapping, in lines 1 and 2",
        ),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_reason(text, reason, error_of):
    assert error_of(text).startswith("config FILE cannot be read: ")
    assert reason in error_of(text)
    assert error_of(text).endswith(". Set --config.")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(tmp_path / "none.yaml")])
    message = str(raised.value)
    assert f"{tmp_path}/none.yaml" in message
    assert "No such file or directory" in message
    assert message.endswith("Set --config.")


# ---- errors in flags ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hiden-size", "3"], "--hidden-size"),
        (["--hidden-size", "wide"], "invalid literal for int() with base 10: 'wide'"),
        (["--dtype", "bf15"], "bf16"),
        (["--deepspeed", "3"], "Unrecognized"),
        (["--config"], "Missing value"),
        (["--self-test", "off"], "only"),
        (["--self-test", "only", "none"], "at most one of start, only, none"),
    ],
)
def test_a_bad_flag_exits_with_2_and_shows_similar_ones(arguments, expected, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(arguments)
    assert raised.value.code == 2
    assert expected in capsys.readouterr().err


def test_without_console_a_bad_flag_prints_nothing(capsys):
    with pytest.raises(SystemExit) as raised:
        parse(["--hiden-size", "3"], console=False)
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", "")


# ---- problems within a section ----

AT_LEAST_ONE = {
    ModelConfig: ["num_layers", "hidden_size", "num_attention_heads"],
    ParallelConfig: [
        "ulysses_degree",
        "stripe_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    ],
    DataConfig: ["seq_length"],
    TrainingConfig: ["train_iters", "micro_batch_size", "eval_iters"],
    LoggingConfig: ["log_interval"],
}


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section in AT_LEAST_ONE for name in AT_LEAST_ONE[section]],
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(section, name, value):
    problems = section(**{name: value}).problems()
    [problem] = [problem for problem in problems if problem.startswith(f"{name} {value} ")]
    assert "at least 1" in problem
    assert f"--{name.replace('_', '-')}" in problem


# A section, the parts of its only problem before the remedy, and the flags of the remedy.
PROBLEMS = [
    (
        ModelConfig(hidden_size=250, num_attention_heads=4),
        ["hidden_size 250 ", "num_attention_heads 4", "248, 252."],
        ["--hidden-size", "--num-attention-heads", "--kv-channels"],
    ),
    (
        ModelConfig(num_attention_heads=8, num_query_groups=3),
        ["num_query_groups 3 ", "num_attention_heads 8", "1, 2, 4, 8."],
        ["--num-query-groups"],
    ),
    (
        ModelConfig(num_attention_heads=4, num_query_groups=-1),
        ["num_query_groups -1 ", "at least 0"],
        ["--num-query-groups"],
    ),
    (
        ModelConfig(hidden_size=12, num_attention_heads=4),
        ["head dim 3 ", "hidden_size 12", "num_attention_heads 4", "2, 4."],
        ["--kv-channels", "--position-embedding-type learned_absolute"],
    ),
    (
        ModelConfig(hidden_size=250, num_attention_heads=4, kv_channels=63),
        ["head dim 63 ", "kv_channels", "62, 64."],
        ["--kv-channels", "--position-embedding-type learned_absolute"],
    ),
    (
        ModelConfig(kv_channels=-64),
        ["kv_channels -64 ", "at least 0"],
        ["--kv-channels"],
    ),
    (
        ModelConfig(kv_channels=64, num_attention_heads=8, num_query_groups=3),
        ["num_query_groups 3 ", "num_attention_heads 8", "1, 2, 4, 8."],
        ["--num-query-groups"],
    ),
    (
        ModelConfig(add_bias_linear=True, add_qkv_bias=True),
        ["add_qkv_bias ", "add_bias_linear"],
        ["--add-qkv-bias", "--add-bias-linear"],
    ),
    (
        ModelConfig(rope_scaling="yarn"),
        ["rope_scaling yarn ", "1.0", "above 1"],
        ["--rope-scaling-factor", "--rope-scaling none"],
    ),
    (
        ModelConfig(rope_scaling_factor=2.0),
        ["rope_scaling_factor 2.0 ", "rope_scaling none"],
        ["--rope-scaling linear"],
    ),
    (
        ModelConfig(ffn_hidden_size=-4),
        ["ffn_hidden_size -4 ", "at least 0"],
        ["--ffn-hidden-size"],
    ),
    (
        ModelConfig(rope_original_length=512),
        ["rope_original_length 512 ", "rope_scaling none"],
        ["--rope-scaling yarn or llama3", "--rope-original-length 0"],
    ),
    (
        ModelConfig(
            rope_scaling="ntk", rope_scaling_factor=2.0, position_embedding_type="learned_absolute"
        ),
        ["rope_scaling ntk ", "position_embedding_type learned_absolute"],
        ["--rope-scaling none", "--position-embedding-type rope"],
    ),
    (
        ModelConfig(window_size=-8),
        ["window_size -8 ", "at least 0"],
        ["--window-size"],
    ),
    (
        ModelConfig(window_attn_skip_freq=-2),
        ["window_attn_skip_freq -2 ", "at least 0"],
        ["--window-attn-skip-freq"],
    ),
    *(
        (
            ModelConfig(window_attn_skip_freq=frequency),
            [f"window_attn_skip_freq {frequency} ", "window_size 0"],
            ["--window-size", "--window-attn-skip-freq 0"],
        )
        for frequency in (4, 1)
    ),
    (
        ModelConfig(window_size=8, window_attn_skip_freq=1),
        ["window_size 8 ", "window_attn_skip_freq 1"],
        ["--window-attn-skip-freq", "--window-size 0"],
    ),
    (
        ParallelConfig(context_parallel_size=-2),
        ["context_parallel_size -2 ", "at least 0"],
        ["--context-parallel-size"],
    ),
    (
        ParallelConfig(ulysses_degree=0),
        ["ulysses_degree 0 ", "at least 1"],
        ["--ulysses-degree"],
    ),
    (
        ParallelConfig(tensor_model_parallel_size=0),
        ["tensor_model_parallel_size 0 ", "at least 1"],
        ["--tensor-model-parallel-size"],
    ),
    (
        ParallelConfig(pipeline_model_parallel_size=-1),
        ["pipeline_model_parallel_size -1 ", "at least 1"],
        ["--pipeline-model-parallel-size"],
    ),
    (
        MemoryConfig(recompute="selective", recompute_attention=True),
        ["recompute_attention ", "recompute selective"],
        ["--recompute full", "--recompute-attention"],
    ),
    (
        MemoryConfig(mlp_chunks=0),
        ["mlp_chunks 0 ", "at least 1"],
        ["--mlp-chunks"],
    ),
    (
        MemoryConfig(loss_chunk_size=-1),
        ["loss_chunk_size -1 ", "at least 0"],
        ["--loss-chunk-size"],
    ),
    (
        TrainingConfig(clip_grad=-1.0),
        ["clip_grad -1.0 ", "at least 0"],
        ["--clip-grad"],
    ),
    (
        TrainingConfig(adam_beta2=1.0),
        ["adam_beta2 1.0 ", "at least 0 and below 1"],
        ["--adam-beta2"],
    ),
    (
        CheckpointConfig(save="runs", save_interval=-5),
        ["save_interval -5 ", "at least 0"],
        ["--save-interval"],
    ),
    (
        CheckpointConfig(save="runs", keep_last=-1),
        ["keep_last -1 ", "at least 0"],
        ["--keep-last"],
    ),
    (
        CheckpointConfig(save="runs", keep_last=2, keep_every=-1),
        ["keep_every -1 ", "at least 0"],
        ["--keep-every"],
    ),
    *(
        (
            DataConfig(split=split),
            [f"split {split} ", "two or three", "at least 0", "first above 0"],
            ["--split"],
        )
        for split in ((math.nan, 1.0), (0.0, 1.0), (0.0, 0.0, 0.0), (1.0, math.inf), (1.5, -0.5))
    ),
    (
        DataConfig(data_path=("0.7", "a", "b")),
        ["data_path ", "3 words", "0.7 A 0.3 B"],
        ["--data-path"],
    ),
    *(
        (
            DataConfig(data_path=("1", "a", weight, "b")),
            ["data_path ", f"'{weight}' before b", "above 0"],
            ["--data-path"],
        )
        for weight in ("0", "-1", "nan", "inf", "1/0", "c")
    ),
    (
        DataConfig(data_path=("1", "a", "2", "b", "3", "a")),
        ["data_path ", "a 2 times"],
        ["--data-path"],
    ),
    (TrainingConfig(lr=0.0, min_lr=0.0), ["lr 0.0 ", "above 0"], ["--lr"]),
    (TrainingConfig(lr=float("nan")), ["lr nan ", "above 0"], ["--lr"]),
    (TrainingConfig(lr=0.1, min_lr=0.2), ["min_lr 0.2 ", "lr 0.1"], ["--min-lr", "--lr"]),
    (
        TrainingConfig(train_iters=10, lr_warmup_iters=10),
        ["lr_warmup_iters 10 ", "train_iters 10"],
        ["--lr-warmup-iters to at most 9", "--lr-decay-style constant"],
    ),
    (
        TrainingConfig(lr_decay_iters=10, lr_warmup_iters=10),
        ["lr_warmup_iters 10 ", "lr_decay_iters 10"],
        [
            "--lr-warmup-iters to at most 9",
            "--lr-decay-iters to at least 11",
            "--lr-decay-style constant",
        ],
    ),
    (CheckpointConfig(save_interval=5), ["save_interval 5 ", "save is empty"], ["--save"]),
    (CheckpointConfig(finetune=True), ["finetune ", "load is empty"], ["--load"]),
    (
        CheckpointConfig(finetune=True, load="runs", save="runs"),
        ["finetune ", "load runs", "save"],
        ["--save"],
    ),
    (
        CheckpointConfig(async_save=True),
        ["async_save ", "save is empty"],
        ["--save", "--async-save"],
    ),
    (
        CheckpointConfig(keep_last=3),
        ["keep_last 3 ", "save is empty"],
        ["--save", "--keep-last 0"],
    ),
    (
        CheckpointConfig(save="runs", keep_every=100),
        ["keep_every 100 ", "keep_last is 0"],
        ["--keep-last", "--keep-every 0"],
    ),
]


@pytest.mark.parametrize(
    ("section", "parts", "flags"), PROBLEMS, ids=["".join(parts[:2]) for _, parts, _ in PROBLEMS]
)
def test_an_illegal_section_has_one_problem_with_its_rule_and_flags(section, parts, flags):
    [problem] = section.problems()
    rule, _, remedy = problem.rpartition(". ")
    assert rule.startswith(parts[0])
    assert all(part in problem for part in parts)
    assert all(flag in remedy for flag in flags)


LEGAL = [
    *(section() for section in SECTIONS),
    ModelConfig(hidden_size=12, num_attention_heads=4, position_embedding_type="learned_absolute"),
    ModelConfig(rope_scaling="yarn", rope_scaling_factor=2.0),
    ModelConfig(window_size=1),
    ModelConfig(window_size=8, window_attn_skip_freq=2),
    ModelConfig(softmax_type="off-by-one"),
    ModelConfig(hidden_size=250, kv_channels=64, add_qkv_bias=True, qk_layernorm=True),
    ModelConfig(kv_channels=3, position_embedding_type="learned_absolute"),
    MemoryConfig(recompute="full", recompute_attention=True, loss_chunk_size=0),
    DataConfig(split=(1.0, 0.0)),
    DataConfig(split=(0.9, 0.0, 0.1)),
    DataConfig(split=(969, 30, 1)),
    DataConfig(split=(0.5, 0.4)),
    TrainingConfig(train_iters=10, lr_warmup_iters=10, lr_decay_style="constant"),
    TrainingConfig(lr_decay_iters=10),
    CheckpointConfig(save="runs", save_interval=5),
    CheckpointConfig(save="runs", keep_last=2, keep_every=100),
]


@pytest.mark.parametrize("section", LEGAL, ids=str)
def test_legal_sections_have_no_problems(section):
    assert section.problems() == []


@pytest.mark.parametrize("train_iters", [1, 2, 9, 10, 19, 20, 199, 200])
def test_the_defaults_accept_a_run_of_any_length(train_iters):
    assert Config(training=TrainingConfig(train_iters=train_iters)).problems() == []


def test_all_problems_are_reported_together():
    config = Config(
        model=ModelConfig(hidden_size=250),
        data=DataConfig(seq_length=0),
        checkpoint=CheckpointConfig(save_interval=1),
    )
    problems = config.problems()
    assert [problem.split()[0] for problem in problems] == [
        "hidden_size",
        "seq_length",
        "save_interval",
    ]


# ---- derived values ----


@pytest.mark.parametrize(
    ("model", "feed_forward_size"),
    [
        (ModelConfig(hidden_size=256, activation="swiglu"), 704),
        (ModelConfig(hidden_size=768, activation="swiglu"), 2048),
        (ModelConfig(hidden_size=256, activation="gelu"), 1024),
        (ModelConfig(hidden_size=256, ffn_hidden_size=100), 100),
    ],
)
def test_the_default_feed_forward_size_depends_on_the_activation(model, feed_forward_size):
    assert model.feed_forward_size == feed_forward_size


def test_head_dim_and_key_value_heads_have_derived_defaults():
    model = ModelConfig(hidden_size=256, num_attention_heads=8)
    assert (model.head_dim, model.key_value_heads) == (32, 8)
    assert replace(model, num_query_groups=2).key_value_heads == 2
    assert replace(model, kv_channels=128).head_dim == 128


@pytest.mark.parametrize(
    ("model", "windows"),
    [
        (ModelConfig(), [0, 0, 0, 0, 0]),
        (ModelConfig(window_size=8), [8, 8, 8, 8, 8]),
        (ModelConfig(window_size=8, window_attn_skip_freq=2), [8, 0, 8, 0, 8]),
        (ModelConfig(window_size=8, window_attn_skip_freq=3), [8, 8, 0, 8, 8]),
    ],
)
def test_every_nth_layer_uses_full_attention(model, windows):
    assert [model.window_of(layer) for layer in range(5)] == windows


def test_the_vocabulary_covers_every_token_id():
    assert ModelConfig().vocabulary_size(61) == 61
    assert ModelConfig(padded_vocab_size=64).vocabulary_size(61) == 64
    with pytest.raises(ConfigError, match="padded_vocab_size 60 .* 61 ids.*--padded-vocab-size"):
        ModelConfig(padded_vocab_size=60).vocabulary_size(61)


# ---- values that no option can have ----

ODD_VALUES = [
    "null", "true", "[]", "[1]", "{}", "{a: 1}", "''", "x", '"a\\0b"', '"\\ud800"', "-1", "0", "1",
    "2147483648", "9223372036854775807", "-9223372036854775808", "99999999999999999999",
    "1.0e308", "1e-320", ".inf", "-.inf", ".nan", "2001-01-01", "2001-01-01 00:00:00 +23:59",
    "!!binary aGk=", "!!set {a}", "[.nan, .nan]", "['1e999999999', a]", "[1e999999999, a, 1, b]",
    "[1, [2, [3]]]", "'1e999999999'", "65537",
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (field.name, f.name)
        for field in fields(Config)
        if is_dataclass(field.type)
        for f in fields(field.type)
    ],
)
def test_any_value_of_any_option_is_accepted_or_a_bounded_error(section, name, yaml):
    for value in ODD_VALUES:
        try:
            problems = load_yaml(yaml(f"{section}: {{{name}: {value}}}")).problems()
        except ConfigError as error:
            problems = error.problems
        assert all(len(problem) < 2000 for problem in problems), value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {num_layers: 65537}", "num_layers"),
        ("parallel: {world_size: 131073}", "world_size"),
        ("model: {hidden_size: 2147483648}", "hidden_size"),
        ("model: {hidden_size: -2147483648}", "hidden_size"),
        ("model: {rotary_base: .inf}", "rotary_base"),
        ("training: {lr: 1.0e400}", "lr"),
        ("training: {clip_grad: .inf}", "clip_grad"),
        ("data: {split: [.nan, .nan]}", "split"),
        ('data: {tokenizer_model: "a\\0b"}', "tokenizer_model"),
        ('checkpoint: {save: "\\ud800"}', "save"),
        ("training: {deepspeed: {a: [2001-01-01]}}", "deepspeed"),
        ("training: {deepspeed: {1: 2}}", "deepspeed"),
        ("training: {deepspeed: [[a, 1]]}", "deepspeed"),
    ],
)
def test_values_that_arithmetic_or_the_file_system_would_fail_on_are_refused(text, named, error_of):
    assert named in error_of(text)


def test_a_seed_may_have_63_bits(yaml):
    assert load_yaml(yaml(f"training: {{seed: {2**63 - 1}}}")).problems() == []


@pytest.mark.parametrize(
    "flags", [["--num-layers", "9" * 4000], ["--rotary-base", "nan"], ["--lr", "1e999"]]
)
def test_flags_have_the_same_limits_as_files(flags):
    [problem] = parse(flags).problems()
    assert flags[0] in problem
    assert len(problem) < 200


def test_a_number_too_long_for_python_is_a_bad_flag(capsys):
    with pytest.raises(SystemExit) as raised:
        parse(["--num-layers", "9" * 5000])
    assert raised.value.code == 2


@pytest.mark.parametrize(
    "weight", ["1e999999999", "1e-999999999", "nan", "inf", "-1", "0", "1" * 101, "1/0", ""]
)
def test_unusable_weights_of_a_blend_are_refused_in_bounded_time(weight):
    [problem] = limited(lambda: DataConfig(data_path=(weight, "a", "1", "b")).problems())
    assert "before a" in problem


def test_the_legal_groups_of_very_many_heads_are_found_quickly():
    heads = 2**31 - 2
    [problem] = limited(
        lambda: ModelConfig(
            hidden_size=heads, num_attention_heads=heads, num_query_groups=4
        ).problems()
    )
    assert " 1, 2, 3, 6, 7, 9," in problem


def test_hostile_files_are_refused_within_limits(yaml):
    aliases = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    aliases += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    for text in (
        "model: " + "[" * 1000,
        "model: {num_layers: " + "9" * 5000 + "}",
        "\n".join([*aliases, "model: *a8"]),
        "x" * (1 << 20),
        "model: &m [*m]",
    ):
        path = yaml(text)
        with pytest.raises(ConfigError, match="Set --config"):
            limited(lambda path=path: load_yaml(path))


def test_a_pipe_is_refused_as_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="regular"):
        limited(lambda: load_yaml(tmp_path / "pipe.yaml"))


@pytest.mark.parametrize("words", [("",), (".",), ("/",), ("1", "", "2", "b")])
def test_a_store_without_a_name_is_refused(words):
    [problem] = DataConfig(data_path=words).problems()
    assert "--data-path" in problem
