"""What a run reads is checked together, before anything is started."""

from dataclasses import replace

import pytest

from megatron_ring.config import DataConfig
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.manifest import Manifest, write_manifest
from megatron_ring.errors import ConfigError, DataError


@pytest.fixture
def config(store_of, tokenizer, tmp_path) -> DataConfig:
    """A store of ten documents, the fourth of which has no end."""
    end = tokenizer.end_of_document
    store = store_of([[5, 6, 7, 8] if n == 3 else [5, 6, 7, end] for n in range(10)])
    tokenizer.save(tmp_path / "the.model")
    return DataConfig(
        (str(store.prefix),), str(tmp_path / "the.model"), split=(1.0, 0.0), seq_length=8
    )


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_documents_without_ends_cannot_be_told_apart(config, flag):
    with pytest.raises(DataError) as refused:
        Dataset.open(replace(config, **{flag: True}), seed=1)
    said = str(refused.value)
    assert (
        "1 of 10 documents looked at, the first of them number 3, do not end with the end-of-document token"
        in said
    )
    assert f"from which {flag} read" in said
    assert f"or leave out --{flag.replace('_', '-')}." in said


def test_without_those_flags_they_need_no_ends(config):
    assert Dataset.open(config, seed=1).training.samples_per_epoch == 4


def manifest_of(tokenizer_sha256: str) -> Manifest:
    return Manifest(tokenizer_sha256, vocab_size=320, documents=10, tokens=40, bytes=100)


def test_the_stores_of_a_blend_have_one_tokenizer(config, store_of, tokenizer):
    path = config.data_path[0]
    other = str(store_of([[5, 6, 7, 8]] * 10).prefix)
    blend = replace(config, data_path=("2", path, "1", other))
    write_manifest(path, manifest_of(tokenizer.fingerprint))
    write_manifest(other, manifest_of(tokenizer.fingerprint))
    assert Dataset.open(blend, seed=1).training.in_words() == [
        f"66.67% of the samples from {path}: 4 training samples an epoch",
        f"33.33% of the samples from {other}: 4 training samples an epoch",
    ]
    write_manifest(other, manifest_of("another tokenizer"))
    with pytest.raises(DataError) as refused:
        Dataset.open(blend, seed=1)
    said = f"token stores {path} and {other} cannot be blended: they were written with two tokenizers (sha256 "
    assert str(refused.value).startswith(f"{said}{tokenizer.fingerprint[:12]} and another toke)")


def test_a_store_of_a_blend_that_is_missing_or_too_small_is_named(config, store_of):
    path = config.data_path[0]
    with pytest.raises(DataError, match="token store nowhere: no nowhere.bin and no nowhere.idx"):
        Dataset.open(replace(config, data_path=("2", path, "1", "nowhere")), seed=1)
    small = str(store_of([[5, 6, 7, 8]]).prefix)
    with pytest.raises(
        DataError, match=rf"^token store {small}: training: .* and one sample takes 9 "
    ):
        Dataset.open(replace(config, data_path=("2", path, "1", small)), seed=1)


def test_a_blend_without_validation_has_none(config, store_of):
    blend = ("2", config.data_path[0], "1", str(store_of([[5, 6, 7, 8]] * 10).prefix))
    assert Dataset.open(replace(config, data_path=blend), seed=1).validation is None
    assert (
        Dataset.open(
            replace(config, data_path=blend, split=(0.5, 0.5)), seed=1
        ).validation.seq_length
        == 8
    )


@pytest.mark.parametrize("packing", ["concatenate", "greedy", "best-fit"])
def test_of_three_shares_the_last_is_the_test_s_in_every_store(store_of, config, packing):
    """Documents that tell their store and their number, of as many tokens as a sample."""
    stores = [store_of([[100 * store + n] * 8 for n in range(1, 11)]) for store in (1, 2)]
    split = replace(config, split=(0.5, 0.3, 0.2), seq_length=7, packing=packing)
    blended = Dataset.open(
        replace(split, data_path=("1", str(stores[0].prefix), "1", str(stores[1].prefix))), seed=1
    )
    parts = {"training": range(1, 6), "validation": range(6, 9), "test": range(9, 11)}
    for part, documents in parts.items():
        met = {int(token) for index in range(40) for token in getattr(blended, part).sample(index)}
        assert met - {-100} == {100 * store + n for store in (1, 2) for n in documents}


@pytest.mark.parametrize("split", [(0.5, 0.5), (0.5, 0.5, 0.0)])
def test_without_a_third_share_there_is_no_test(config, split):
    assert Dataset.open(replace(config, split=split), seed=1).test is None


def test_shares_of_any_sum_are_those_over_it(config):
    whole, parts = (
        Dataset.open(replace(config, split=split), seed=1) for split in ((0.5, 0.5), (7, 7))
    )
    for name in ("training", "validation"):
        of_one, of_other = getattr(whole, name), getattr(parts, name)
        assert [of_one.sample(n).tolist() for n in range(3)] == [
            of_other.sample(n).tolist() for n in range(3)
        ]


@pytest.mark.parametrize(
    ("split", "error"), [((969, 30, 1), ConfigError), ((0.969, 0.03, 0.001), DataError)]
)
def test_a_part_without_a_document_is_refused(split, error, config):
    """Shares of another sum than 1 may be meant as something else, so then it is the option that is wrong."""
    with pytest.raises(error, match=r"^token store .*(split|Set --split)") as refused:
        Dataset.open(replace(config, split=split), seed=1)
    assert "validation" in str(refused.value)
    assert "test" in str(refused.value)
    assert ("adds up to 1000" in str(refused.value)) == (error is ConfigError)


def test_a_test_share_that_fills_no_sample_is_refused(config):
    with pytest.raises(
        DataError,
        match=r"^token store .*: test: a share of 0.2 of 10 documents is 2 documents with 8 ",
    ):
        Dataset.open(replace(config, split=(0.5, 0.3, 0.2)), seed=1)


@pytest.mark.parametrize("packing", ["greedy", "best-fit"])
def test_whole_documents_are_packed_on_demand(config, packing):
    (line,) = Dataset.open(replace(config, packing=packing), seed=1).training.in_words()
    assert line.endswith(
        f"5 training samples an epoch of whole documents ({packing}), 0.00% of their tokens lost to fill"
    )
