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
    """Write a config file and give its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def complaint(yaml):
    """What is said of a config file, its path left out."""

    def complain(text: str | bytes) -> str:
        path = yaml(text)
        with pytest.raises(ConfigError) as raised:
            load_yaml(path)
        return str(raised.value).replace(path, "FILE")

    return complain


# ---- default < YAML < flag ----


def test_a_flag_goes_over_the_file_and_the_file_over_the_default(yaml):
    path = yaml("training: {lr: 0.5, seed: 7}\nmodel: {num_layers: 9}")
    config = parse(["--config", path, "--seed", "8", "--hidden-size", "512"])
    assert (config.training.lr, config.model.num_layers) == (0.5, 9)
    assert (config.training.seed, config.model.hidden_size) == (8, 512)
    assert config.training.train_iters == TrainingConfig().train_iters
    assert config.config == path


def test_no_arguments_are_the_defaults():
    assert parse([]) == Config()


@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_the_file_may_follow_an_equals_sign(yaml, spelling):
    assert parse(spelling.format(yaml("training: {seed: 7}")).split()).training.seed == 7


def test_underscores_are_as_good_as_dashes():
    assert parse(["--seq_length", "77"]).data.seq_length == 77


def test_lists_are_given_as_flags_or_in_the_file(yaml):
    path = yaml("data: {data_path: store, split: [0.5, 0.5]}")
    assert load_yaml(path).data == DataConfig(data_path=("store",), split=(0.5, 0.5))
    config = parse(["--config", path, "--split", "0.9", "0.1", "--data-path", "other"])
    assert config.data == DataConfig(data_path=("other",), split=(0.9, 0.1))
    assert parse(["--config", path, "--split", "0.8", "0.1", "0.1"]).data.split == (0.8, 0.1, 0.1)


@pytest.mark.parametrize(
    "words", ["969,30,1", "969 30 1", "969, 30, 1", "969,30 1", "=969,30,1", "969.0,30.0,1.0"]
)
def test_shares_may_have_commas_between_them_and_any_sum(words):
    """As Megatron's."""
    flag = ["--split" + words] if words.startswith("=") else ["--split", *words.split()]
    data = parse([*flag, "--seed", "7"]).data
    assert data.split == (969.0, 30.0, 1.0)
    assert data.shares == (0.969, 0.03, 0.001)
    assert data.problems() == []


@pytest.mark.parametrize("text", ["[969, 30, 1]", "969,30,1", "'969, 30, 1'", "[969, 30.0, '1']"])
def test_shares_in_a_file_may_have_commas_between_them(text, yaml):
    assert load_yaml(yaml(f"data:\n  split: {text}")).data.split == (969.0, 30.0, 1.0)


def test_shares_that_add_up_to_1_stay_as_they_are():
    assert DataConfig(split=(0.9, 0.0999995)).shares == (0.9, 0.0999995)
    assert DataConfig(split=(1, 1)).shares == (0.5, 0.5)


@pytest.mark.parametrize("words", ["1", "1,2,3,4", "", "a,b", "1 2 3 4"])
def test_shares_are_two_or_three_numbers(words, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--split", *words.split()])
    assert left.value.code == 2
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
def test_a_window_may_be_megatrons_pair_which_leaves_out_the_token_itself(word, keys, yaml):
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
def test_a_window_is_of_tokens_before(words, capsys, yaml):
    with pytest.raises(SystemExit) as left:
        parse(["--window-size", *words.split()])
    assert left.value.code == 2
    assert "window-size" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="window_size"):
        load_yaml(yaml(f"model: {{window_size: '{words}'}}"))


def test_the_self_test_without_a_word_is_all_that_is_done(yaml):
    assert parse([]).self_test == "start"
    assert parse(["--self-test"]).self_test == "only"
    assert parse(["--self-test", "--lr", "0.1"]).self_test == "only"
    path = yaml("self_test: none")
    assert parse(["--config", path]).self_test == "none"
    assert parse(["--config", path, "--self-test", "start"]).self_test == "start"


def test_a_blend_alternates_weights_and_stores_and_the_weights_are_exact():
    blend = parse(["--data-path", "0.7", "a", "0.1", "b"]).data.blend
    assert blend == {"a": Fraction(7, 10), "b": Fraction(1, 10)}
    assert DataConfig(data_path=("0.7",)).blend == {"0.7": 1}
    assert DataConfig().blend == {}


def test_a_blend_in_a_file_is_a_list_of_text(yaml):
    written = parse(["--data-path", "0.7", "a", "0.3", "b", "--packing", "best-fit"])
    assert load_yaml(yaml(to_yaml(written))) == written


def test_scientific_notation_without_a_point_is_a_number(yaml):
    """YAML reads 3e-4 as text."""
    assert load_yaml(yaml("training: {lr: 3e-4, min_lr: 1}")).training == TrainingConfig(
        lr=3e-4, min_lr=1.0
    )


def test_keys_for_deepspeed_come_from_the_file_alone_and_stay_as_they_are(yaml):
    """Though they share names with flags and with each other."""
    extra = "{lr: 5, tensorboard: {enabled: true}, csv_monitor: {enabled: true}}"
    config = parse(["--config", yaml(f"training: {{deepspeed: {extra}}}"), "--lr", "7"])
    assert config.training.lr == 7.0
    assert config.training.deepspeed == {
        "lr": 5,
        "tensorboard": {"enabled": True},
        "csv_monitor": {"enabled": True},
    }


def test_an_empty_file_is_the_defaults(yaml):
    assert load_yaml(yaml("")) == Config()


# ---- every option, once ----


def documented(section: type) -> dict[str, str]:
    """The text under every field of a dataclass."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    return {
        statement.target.id: text.value.value
        for statement, text in pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def words(text: str) -> str:
    """Letters and digits alone: what is left of a text whatever box it is printed in and wherever its lines break."""
    return re.sub(r"[\W_]", "", text)


@pytest.fixture(scope="module")
def help_text() -> str:
    """What --help prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    return printed.getvalue()


OPTIONS = [
    (section, field.name)
    for section in [*SECTIONS, Config]
    for field in fields(section)
    if not is_dataclass(field.type) and field.name != "deepspeed"
]


@pytest.mark.parametrize(("section", "name"), OPTIONS)
def test_every_option_is_a_flag_and_the_text_under_it_its_help(section, name, help_text):
    assert re.search(rf"--{name.replace('_', '-')}[ ,]", help_text)
    assert words(documented(section)[name]) in words(help_text)


def test_no_two_sections_share_a_name():
    """Flags carry no section, and neither does a hint at the nearest key."""
    names = [field.name for section in [*SECTIONS, Config] for field in fields(section)]
    assert len(names) == len(set(names))


# ---- the resolved config ----


def test_the_resolved_config_is_itself_a_config(tmp_path):
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


def test_the_resolved_config_keeps_what_is_for_deepspeed(yaml):
    config = load_yaml(
        yaml("training: {deepspeed: {comms_logger: {enabled: true, prof_ops: [all_reduce]}}}")
    )
    assert load_yaml(yaml(to_yaml(config))) == config


def test_the_resolved_config_holds_every_option_but_where_it_came_from_and_what_is_done_with_it():
    resolved = to_yaml(replace(Config(), config="some.yaml", dry_run=True, self_test="none"))
    assert all(f"  {field.name}:" in resolved for section in SECTIONS for field in fields(section))
    assert "some.yaml" not in resolved
    assert "dry_run" not in resolved
    assert "self_test" not in resolved


# ---- what a file may not say ----

MISTAKES = {
    "modle: {num_layers: 2}": "FILE: unknown key 'modle'. Did you mean model?",
    "model: {num_layer: 2}": "FILE: model: unknown key 'num_layer'. Did you mean num_layers?",
    "model: {lr: 2}": "FILE: model: unknown key 'lr'. Did you mean training.lr?",
    "seq_lenght: 2": "FILE: unknown key 'seq_lenght'. Did you mean data.seq_length?",
    "checkpoint: {xyzzy: 2}": "FILE: checkpoint: unknown key 'xyzzy'. Known here: save, load, finetune, "
    "allow_other_data, save_interval, async_save, keep_last, keep_every.",
    "1: 2": "FILE: unknown key 1. Known here: model, parallel, data, training, memory, checkpoint, guards, logging, "
    "config, dry_run, self_test.",
    "model: 3": "FILE: model: expected keys and values, found 3.",
    "[a, b]": "FILE: expected keys and values, found ['a', 'b'].",
    "model: {num_layers: 2.0}": "FILE: model: num_layers is 2.0, not of type int.",
    "model: {num_layers: true}": "FILE: model: num_layers is True, not of type int.",
    "model: {add_bias_linear: 1}": "FILE: model: add_bias_linear is 1, not of type bool.",
    "model: {softmax_type: off}": "FILE: model: softmax_type is False, not one of vanilla, off-by-one, learnable.",
    "training: {lr: fast}": "FILE: training: lr is 'fast', not of type float.",
    "training: {lr: true}": "FILE: training: lr is True, not of type float.",
    "training: {dtype: bf15}": "FILE: training: dtype is 'bf15', not one of auto, fp32, bf16, fp16.",
    "training: {zero_stage: true}": "FILE: training: zero_stage is True, not one of 0, 1, 2, 3.",
    "training: {zero_stage: 1.0}": "FILE: training: zero_stage is 1.0, not one of 0, 1, 2, 3.",
    "training: {zero_stage: [1]}": "FILE: training: zero_stage is [1], not one of 0, 1, 2, 3.",
    "training: {deepspeed: 3}": "FILE: training: deepspeed is 3, not of type dict.",
    "data: {split: [1]}": "FILE: data: split is [1], not a list of 2 float or a list of 3 float.",
    "data: {split: {0.9: a, 0.1: b}}": (
        "FILE: data: split is {0.1: 'b', 0.9: 'a'}, not a list of 2 float or a list of 3 float."
    ),
    "data: {split: 0.9}": "FILE: data: split is 0.9, not a list of 2 float or a list of 3 float.",
    "data: {data_path: [3]}": "FILE: data: data_path is [3], not a list of str.",
    "checkpoint: {save: 3}": "FILE: checkpoint: save is 3, not of type str.",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_what_a_file_may_not_say(text, complaint):
    assert complaint(text) == MISTAKES[text]


def test_all_mistakes_in_a_file_are_said_at_once(complaint):
    three = ["model: {num_layers: two}", "training: {lr: fast}", "data: {split: [1]}"]
    assert complaint("\n".join(three)).splitlines() == [
        "FILE: model: num_layers is 'two', not of type int.",
        "FILE: training: lr is 'fast', not of type float.",
        "FILE: data: split is [1], not a list of 2 float or a list of 3 float.",
    ]


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
def test_a_file_that_is_not_yaml(text, reason, complaint):
    assert complaint(text).startswith("config FILE cannot be read: ")
    assert reason in complaint(text)
    assert complaint(text).endswith(". Set --config.")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(tmp_path / "none.yaml")])
    assert (
        str(raised.value)
        == f"config {tmp_path}/none.yaml cannot be read: No such file or directory. Set --config."
    )


# ---- what a flag may not say ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hiden-size", "3"], "--hidden-size"),
        (["--hidden-size", "wide"], "invalid literal for int() with base 10: 'wide'"),
        (["--dtype", "bf15"], "bf16"),
        (["--deepspeed", "3"], "Unrecognized"),
        (["--config"], "Missing value"),
        (["--self-test", "off"], "only"),
        (["--self-test", "only", "none"], "takes one word or none"),
    ],
)
def test_a_bad_flag_leaves_with_two_and_names_what_is_near(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_only_one_rank_need_speak(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--hiden-size", "3"], console=False)
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "")


# ---- what a section knows of itself ----

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
    message = f"{name} {value} must be at least 1. Set --{name.replace('_', '-')}."
    assert message in section(**{name: value}).problems()


PROBLEMS = [
    (
        ModelConfig(hidden_size=250, num_attention_heads=4),
        "hidden_size 250 does not divide into 4 attention heads. Nearest: 248, 252. "
        "Set --hidden-size or --num-attention-heads, or give heads a size of their own, --kv-channels.",
    ),
    (
        ModelConfig(num_attention_heads=8, num_query_groups=3),
        "num_query_groups 3 does not divide num_attention_heads 8. Legal: 1, 2, 4, 8. Set --num-query-groups.",
    ),
    (
        ModelConfig(num_attention_heads=4, num_query_groups=-1),
        "num_query_groups -1 must not be below 0. Set --num-query-groups.",
    ),
    (
        ModelConfig(hidden_size=12, num_attention_heads=4),
        "head size 3 (hidden_size 12 / num_attention_heads 4) is odd, and RoPE turns pairs. Nearest: 2, 4. "
        "Set --kv-channels, or --position-embedding-type learned_absolute.",
    ),
    (
        ModelConfig(hidden_size=250, num_attention_heads=4, kv_channels=63),
        "head size 63 (kv_channels) is odd, and RoPE turns pairs. Nearest: 62, 64. "
        "Set --kv-channels, or --position-embedding-type learned_absolute.",
    ),
    (ModelConfig(kv_channels=-64), "kv_channels -64 must not be below 0. Set --kv-channels."),
    (
        ModelConfig(kv_channels=64, num_attention_heads=8, num_query_groups=3),
        "num_query_groups 3 does not divide num_attention_heads 8. Legal: 1, 2, 4, 8. Set --num-query-groups.",
    ),
    (
        ModelConfig(add_bias_linear=True, add_qkv_bias=True),
        "add_qkv_bias has no effect beside add_bias_linear, which gives every linear layer a bias, those of queries, "
        "keys and values too. Leave out --add-qkv-bias, or --add-bias-linear.",
    ),
    (
        ModelConfig(rope_scaling="yarn"),
        "rope_scaling yarn stretches by rope_scaling_factor 1.0, which must be greater than 1. "
        "Set --rope-scaling-factor, or --rope-scaling none.",
    ),
    (
        ModelConfig(rope_scaling_factor=2.0),
        "rope_scaling_factor 2.0 has no effect while rope_scaling is none. "
        "Set --rope-scaling linear (or ntk, yarn, llama3).",
    ),
    (
        ModelConfig(ffn_hidden_size=-4),
        "ffn_hidden_size -4 must not be below 0. Set --ffn-hidden-size.",
    ),
    (
        ModelConfig(rope_original_length=512),
        "rope_original_length 512 has no effect while rope_scaling is none. "
        "Set --rope-scaling yarn or llama3, or --rope-original-length 0.",
    ),
    (
        ModelConfig(
            rope_scaling="ntk", rope_scaling_factor=2.0, position_embedding_type="learned_absolute"
        ),
        "rope_scaling ntk has no effect while position_embedding_type is learned_absolute. "
        "Set --rope-scaling none, or --position-embedding-type rope.",
    ),
    (ModelConfig(window_size=-8), "window_size -8 must not be below 0. Set --window-size."),
    (
        ModelConfig(window_attn_skip_freq=-2),
        "window_attn_skip_freq -2 must not be below 0. Set --window-attn-skip-freq.",
    ),
    (
        ModelConfig(window_attn_skip_freq=4),
        "window_attn_skip_freq 4 has no effect while window_size is 0. "
        "Set --window-size, or --window-attn-skip-freq 0.",
    ),
    (
        ModelConfig(window_attn_skip_freq=1),
        "window_attn_skip_freq 1 has no effect while window_size is 0. "
        "Set --window-size, or --window-attn-skip-freq 0.",
    ),
    (
        ModelConfig(window_size=8, window_attn_skip_freq=1),
        "window_size 8 has no effect while window_attn_skip_freq is 1, which has every layer attend fully. "
        "Set --window-attn-skip-freq to at least 2 or to 0, or --window-size 0.",
    ),
    (
        ParallelConfig(context_parallel_size=-2),
        "context_parallel_size -2 must not be below 0. Set --context-parallel-size.",
    ),
    (
        ParallelConfig(ulysses_degree=0),
        "ulysses_degree 0 must be at least 1. Set --ulysses-degree.",
    ),
    (
        ParallelConfig(tensor_model_parallel_size=0),
        "tensor_model_parallel_size 0 must be at least 1. Set --tensor-model-parallel-size.",
    ),
    (
        ParallelConfig(pipeline_model_parallel_size=-1),
        "pipeline_model_parallel_size -1 must be at least 1. Set --pipeline-model-parallel-size.",
    ),
    (
        MemoryConfig(recompute="selective", recompute_attention=True),
        "recompute_attention has no effect while recompute is selective. "
        "Set --recompute full, or leave --recompute-attention out.",
    ),
    (MemoryConfig(mlp_chunks=0), "mlp_chunks 0 must be at least 1. Set --mlp-chunks."),
    (
        MemoryConfig(loss_chunk_size=-1),
        "loss_chunk_size -1 must not be below 0. Set --loss-chunk-size.",
    ),
    (
        TrainingConfig(clip_grad=-1.0),
        "clip_grad -1.0 must not be below 0. Set --clip-grad.",
    ),
    (
        TrainingConfig(adam_beta2=1.0),
        "adam_beta2 1.0 must be at least 0 and below 1. Set --adam-beta2.",
    ),
    (
        CheckpointConfig(save="runs", save_interval=-5),
        "save_interval -5 must not be below 0. Set --save-interval.",
    ),
    (
        CheckpointConfig(save="runs", keep_last=-1),
        "keep_last -1 must not be below 0. Set --keep-last.",
    ),
    (
        CheckpointConfig(save="runs", keep_last=2, keep_every=-1),
        "keep_every -1 must not be below 0. Set --keep-every.",
    ),
    (
        DataConfig(split=(math.nan, 1.0)),
        "split (nan, 1.0) must be two or three shares (training, validation, test) that are numbers, none below 0, "
        "the first above 0. Set --split.",
    ),
    (
        DataConfig(split=(0.0, 1.0)),
        "split (0.0, 1.0) must be two or three shares (training, validation, test) that are numbers, none below 0, "
        "the first above 0. Set --split.",
    ),
    (
        DataConfig(split=(0.0, 0.0, 0.0)),
        "split (0.0, 0.0, 0.0) must be two or three shares (training, validation, test) that are numbers, none below "
        "0, the first above 0. Set --split.",
    ),
    (
        DataConfig(split=(1.0, math.inf)),
        "split (1.0, inf) must be two or three shares (training, validation, test) that are numbers, none below 0, "
        "the first above 0. Set --split.",
    ),
    (
        DataConfig(split=(1.5, -0.5)),
        "split (1.5, -0.5) must be two or three shares (training, validation, test) that are numbers, none below 0, "
        "the first above 0. Set --split.",
    ),
    (
        DataConfig(data_path=("0.7", "a", "b")),
        "data_path has 3 words: it takes one store, or stores with the weight of each before it, as in 0.7 A 0.3 B, "
        "an even number of words. Set --data-path.",
    ),
    *(
        (
            DataConfig(data_path=("1", "a", weight, "b")),
            f"data_path has '{weight}' before b, where its weight belongs, a number above 0. Set --data-path.",
        )
        for weight in ("0", "-1", "nan", "inf", "1/0", "c")
    ),
    (
        DataConfig(data_path=("1", "a", "2", "b", "3", "a")),
        "data_path names a 2 times: add its weights up. Set --data-path.",
    ),
    (TrainingConfig(lr=0.0, min_lr=0.0), "lr 0.0 must be above 0. Set --lr."),
    (TrainingConfig(lr=float("nan")), "lr nan must be above 0. Set --lr."),
    (TrainingConfig(lr=0.1, min_lr=0.2), "min_lr 0.2 is above lr 0.1. Set --min-lr or --lr."),
    (
        TrainingConfig(train_iters=10, lr_warmup_iters=10),
        "lr_warmup_iters 10 leaves nothing of train_iters 10 to decay. "
        "Set --lr-warmup-iters to at most 9, or --lr-decay-style constant.",
    ),
    (CheckpointConfig(save_interval=5), "save_interval 5 has nowhere to write to. Set --save."),
    (
        CheckpointConfig(finetune=True),
        "finetune has no weights to begin with while load is empty. Set --load.",
    ),
    (
        CheckpointConfig(finetune=True, load="runs", save="runs"),
        "finetune makes a new run of the weights in load runs, and save is the same folder, whose checkpoints are the "
        "old run's. Set --save to another folder.",
    ),
    (
        CheckpointConfig(async_save=True),
        "async_save has nothing to write while save is empty. Set --save, or leave --async-save out.",
    ),
    (
        CheckpointConfig(keep_last=3),
        "keep_last 3 has no effect while save is empty. Set --save, or --keep-last 0.",
    ),
    (
        CheckpointConfig(save="runs", keep_every=100),
        "keep_every 100 has no effect while keep_last is 0, which keeps all. Set --keep-last, or --keep-every 0.",
    ),
]


@pytest.mark.parametrize(
    ("section", "message"), PROBLEMS, ids=[message.split(".")[0] for _, message in PROBLEMS]
)
def test_what_a_section_cannot_be(section, message):
    assert section.problems() == [message]


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
    CheckpointConfig(save="runs", save_interval=5),
    CheckpointConfig(save="runs", keep_last=2, keep_every=100),
]


@pytest.mark.parametrize("section", LEGAL, ids=str)
def test_what_a_section_can_be(section):
    assert section.problems() == []


def test_all_problems_are_found_at_once():
    config = Config(
        model=ModelConfig(hidden_size=250),
        data=DataConfig(seq_length=0),
        checkpoint=CheckpointConfig(save_interval=1),
    )
    found = config.problems()
    assert [problem.split()[0] for problem in found] == [
        "hidden_size",
        "seq_length",
        "save_interval",
    ]


# ---- what is derived ----


@pytest.mark.parametrize(
    ("model", "feed_forward_size"),
    [
        (ModelConfig(hidden_size=256, activation="swiglu"), 704),
        (ModelConfig(hidden_size=768, activation="swiglu"), 2048),
        (ModelConfig(hidden_size=256, activation="gelu"), 1024),
        (ModelConfig(hidden_size=256, ffn_hidden_size=100), 100),
    ],
)
def test_the_feed_forward_size_follows_the_activation_unless_given(model, feed_forward_size):
    assert model.feed_forward_size == feed_forward_size


def test_heads():
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
def test_every_so_many_layers_one_attends_fully(model, windows):
    assert [model.window_of(layer) for layer in range(5)] == windows


def test_a_model_has_a_row_for_every_token_id():
    assert ModelConfig().vocabulary_size(61) == 61
    assert ModelConfig(padded_vocab_size=64).vocabulary_size(61) == 64
    with pytest.raises(
        ConfigError, match="padded_vocab_size 60 has no row for the last of the tokenizer's 61 ids"
    ):
        ModelConfig(padded_vocab_size=60).vocabulary_size(61)


# ---- values that no option can have ----

ODD_VALUES = [
    "null", "true", "[]", "[1]", "{}", "{a: 1}", "''", "x", '"a\\0b"', '"\\ud800"', "-1", "0", "1", "2147483648",
    "9223372036854775807", "-9223372036854775808", "99999999999999999999", "1.0e308", "1e-320", ".inf", "-.inf", ".nan",
    "2001-01-01", "2001-01-01 00:00:00 +23:59", "!!binary aGk=", "!!set {a}", "[.nan, .nan]", "['1e999999999', a]",
    "[1e999999999, a, 1, b]", "[1, [2, [3]]]", "'1e999999999'", "65537",
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
def test_any_value_of_any_option_is_taken_or_is_an_error_of_bounded_length(section, name, yaml):
    for value in ODD_VALUES:
        told = []
        try:
            told = load_yaml(yaml(f"{section}: {{{name}: {value}}}")).problems()
        except ConfigError as error:
            told = error.problems
        assert all(len(problem) < 2000 for problem in told), value


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
def test_a_value_that_arithmetic_or_the_file_system_would_fail_on(text, named, complaint):
    assert named in complaint(text)


def test_a_seed_may_have_all_bits_that_torch_takes(yaml):
    assert load_yaml(yaml(f"training: {{seed: {2**63 - 1}}}")).problems() == []


@pytest.mark.parametrize(
    "flags", [["--num-layers", "9" * 4000], ["--rotary-base", "nan"], ["--lr", "1e999"]]
)
def test_flags_are_held_to_the_same_limits(flags):
    [problem] = parse(flags).problems()
    assert flags[0] in problem
    assert len(problem) < 200


def test_a_number_that_python_does_not_read_is_a_bad_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--num-layers", "9" * 5000])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "weight", ["1e999999999", "1e-999999999", "nan", "inf", "-1", "0", "1" * 101, "1/0", ""]
)
def test_a_weight_of_a_blend_that_cannot_be_computed_with(weight):
    found = limited(lambda: DataConfig(data_path=(weight, "a", "1", "b")).problems())
    assert len(found) == 1
    assert "before a" in found[0]


def test_the_legal_groups_of_very_many_heads_are_found_at_once():
    heads = 2**31 - 2
    [problem] = limited(
        lambda: ModelConfig(
            hidden_size=heads, num_attention_heads=heads, num_query_groups=4
        ).problems()
    )
    assert " 1, 2, 3, 6, 7, 9," in problem


def test_odd_files_are_refused_within_limits(yaml):
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


def test_a_file_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="regular"):
        limited(lambda: load_yaml(tmp_path / "pipe.yaml"))


@pytest.mark.parametrize("words", [("",), (".",), ("/",), ("1", "", "2", "b")])
def test_a_store_without_a_name_is_refused(words):
    [problem] = DataConfig(data_path=words).problems()
    assert "--data-path" in problem
