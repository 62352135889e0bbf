"""What a run reads is checked together, before anything is started."""

from dataclasses import replace

import pytest

from megatron_ring.config import DataConfig
from megatron_ring.data.dataset import Dataset
from megatron_ring.errors import DataError


@pytest.fixture
def config(store_of, tokenizer, tmp_path) -> DataConfig:
    """A store of ten documents, the fourth of which has no end."""
    end = tokenizer.end_of_document
    store = store_of([[5, 6, 7, 8] if n == 3 else [5, 6, 7, end] for n in range(10)])
    tokenizer.save(tmp_path / "the.model")
    return DataConfig((str(store.prefix),), str(tmp_path / "the.model"), split=(1.0, 0.0), seq_length=8)


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_documents_without_ends_cannot_be_told_apart(config, flag):
    with pytest.raises(DataError) as refused:
        Dataset.open(replace(config, **{flag: True}), seed=1)
    said = str(refused.value)
    assert "1 of 10 documents looked at, the first of them number 3, do not end with the end-of-document token" in said
    assert f"from which {flag} read" in said
    assert f"or leave out --{flag.replace('_', '-')}." in said


def test_without_those_flags_they_need_no_ends(config):
    assert Dataset.open(config, seed=1).training.samples_per_epoch == 4
