"""Opening a dataset checks stores, tokenizer, split and document boundaries against one another."""

from dataclasses import replace

import pytest

from megatron_ring.config import DataConfig
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.manifest import Manifest, write_manifest
from megatron_ring.errors import ConfigError, DataError


@pytest.fixture
def config(store_of, tokenizer, tmp_path) -> DataConfig:
    """A store of ten documents; document 3 has no end-of-document token."""
    end = tokenizer.end_of_document
    store = store_of([[5, 6, 7, 8] if n == 3 else [5, 6, 7, end] for n in range(10)])
    tokenizer.save(tmp_path / "the.model")
    return DataConfig(
        (str(store.prefix),), str(tmp_path / "the.model"), split=(1.0, 0.0), seq_length=8
    )


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_boundary_flags_refuse_documents_without_end_tokens(config, tokenizer, flag):
    with pytest.raises(DataError) as caught:
        Dataset.open(replace(config, **{flag: True}), seed=1)
    message = str(caught.value)
    assert "1 of 10 documents" in message
    assert f"(id {tokenizer.end_of_document})" in message
    assert "document 3" in message
    assert flag in message
    assert f"--{flag.replace('_', '-')}." in message


def test_without_boundary_flags_documents_need_no_end_tokens(config):
    assert Dataset.open(config, seed=1).training.samples_per_epoch == 4


def manifest_of(tokenizer_sha256: str) -> Manifest:
    return Manifest(tokenizer_sha256, vocab_size=320, documents=10, tokens=40, bytes=100)


def test_stores_of_a_blend_must_have_the_same_tokenizer(config, store_of, tokenizer):
    path = config.data_path[0]
    other = str(store_of([[5, 6, 7, 8]] * 10).prefix)
    blend = replace(config, data_path=("2", path, "1", other))
    write_manifest(path, manifest_of(tokenizer.fingerprint))
    write_manifest(other, manifest_of(tokenizer.fingerprint))
    assert Dataset.open(blend, seed=1).training.describe() == [
        f"66.67% of the samples from {path}: 4 training samples an epoch",
        f"33.33% of the samples from {other}: 4 training samples an epoch",
    ]
    write_manifest(other, manifest_of("another tokenizer"))
    with pytest.raises(DataError) as caught:
        Dataset.open(blend, seed=1)
    message = str(caught.value)
    assert message.startswith(f"token stores {path} and {other} cannot be blended: ")
    assert f"(sha256 {tokenizer.fingerprint[:12]} and another toke)" in message
    assert "--tokenizer-model" in message
    assert "--data-path" in message


def test_a_store_of_a_blend_that_is_missing_or_too_small_is_named(config, store_of):
    path = config.data_path[0]
    with pytest.raises(DataError, match="token store nowhere: no nowhere.bin and no nowhere.idx"):
        Dataset.open(replace(config, data_path=("2", path, "1", "nowhere")), seed=1)
    small = str(store_of([[5, 6, 7, 8]]).prefix)
    with pytest.raises(DataError, match=rf"^token store {small}: training: .* takes 9 .*--split"):
        Dataset.open(replace(config, data_path=("2", path, "1", small)), seed=1)


def test_a_blend_has_a_validation_stream_only_with_a_validation_share(config, store_of):
    other = str(store_of([[5, 6, 7, 8]] * 10).prefix)
    blend = replace(config, data_path=("2", config.data_path[0], "1", other))
    assert Dataset.open(blend, seed=1).validation is None
    with_validation = Dataset.open(replace(blend, split=(0.5, 0.5)), seed=1)
    assert with_validation.validation.seq_length == 8


@pytest.mark.parametrize("packing", ["concatenate", "greedy", "best-fit", "balanced"])
def test_the_third_share_of_every_store_is_for_the_test(store_of, config, packing):
    """The tokens of a document encode its store and number, and it is as long as a sample."""
    stores = [store_of([[100 * store + n] * 8 for n in range(1, 11)]) for store in (1, 2)]
    path = ("1", str(stores[0].prefix), "1", str(stores[1].prefix))
    split = replace(config, split=(0.5, 0.3, 0.2), seq_length=7, packing=packing, data_path=path)
    blended = Dataset.open(split, seed=1)
    parts = {"training": range(1, 6), "validation": range(6, 9), "test": range(9, 11)}
    for part, documents in parts.items():
        stream = getattr(blended, part)
        tokens = {int(token) for index in range(40) for token in stream.sample(index)}
        assert tokens - {-100} == {100 * store + n for store in (1, 2) for n in documents}


@pytest.mark.parametrize("split", [(0.5, 0.5), (0.5, 0.5, 0.0)])
def test_without_a_third_share_there_is_no_test_stream(config, split):
    assert Dataset.open(replace(config, split=split), seed=1).test is None


def test_shares_are_normalized_by_their_sum(config):
    halves = Dataset.open(replace(config, split=(0.5, 0.5)), seed=1)
    sevens = Dataset.open(replace(config, split=(7, 7)), seed=1)
    for name in ("training", "validation"):
        for index in range(3):
            sample = getattr(halves, name).sample(index)
            assert sample.tolist() == getattr(sevens, name).sample(index).tolist()


@pytest.mark.parametrize(
    ("split", "error"), [((969, 30, 1), ConfigError), ((0.969, 0.03, 0.001), DataError)]
)
def test_a_part_without_documents_is_refused(split, error, config):
    """Shares that do not add up to 1 may be meant as counts, so then the option is at fault."""
    with pytest.raises(error, match=r"^token store .*(split|Set --split)") as caught:
        Dataset.open(replace(config, split=split), seed=1)
    assert "validation" in str(caught.value)
    assert "test" in str(caught.value)
    assert ("adds up to 1000" in str(caught.value)) == (error is ConfigError)


def test_a_test_share_that_fills_no_sample_is_refused(config):
    with pytest.raises(
        DataError,
        match=r"^token store .*: test: a share of 0.2 of 10 documents is 2 documents with 8 ",
    ):
        Dataset.open(replace(config, split=(0.5, 0.3, 0.2)), seed=1)


@pytest.mark.parametrize("packing", ["greedy", "best-fit", "balanced"])
def test_whole_document_packing_is_selected_by_the_option(config, packing):
    (line,) = Dataset.open(replace(config, packing=packing), seed=1).training.describe()
    assert "5 training samples an epoch" in line
    assert f"({packing}), 0.00% padding" in line
