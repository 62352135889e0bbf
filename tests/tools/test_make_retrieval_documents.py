"""tools/make_retrieval_documents.py: what it writes, and what it refuses."""

import json

import pytest

from megatron_ring.errors import ConfigError
from tools.make_retrieval_documents import Options, main


def test_documents_have_the_lines_that_were_asked_for(tmp_path):
    path = tmp_path / "new" / "documents.jsonl"
    main(Options(path, documents=50, lines=(4, 30), haystack_share=0))
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    counts = [text.count("\n") for text in texts]
    assert len(texts) == 50
    assert 4 <= min(counts) < 8
    assert 20 < max(counts) <= 30
    assert len(set(texts)) == 50
    first = path.read_bytes()
    main(Options(path, documents=50, lines=(4, 30), haystack_share=0))
    assert path.read_bytes() == first
    main(Options(path, documents=50, lines=(4, 30), haystack_share=0, seed=2))
    assert path.read_bytes() != first


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"documents": 0}, "--documents"),
        ({"lines": (9, 3)}, "--lines"),
        ({"new_share": 0}, "--new-share"),
        ({"haystack_share": 1}, "--haystack-share"),
        ({"popularity_ratio": 0.5}, "--popularity-ratio"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_bad_option_is_refused(changes, flag, tmp_path):
    with pytest.raises(ConfigError, match=flag):
        main(Options(tmp_path / "documents.jsonl", **changes))
    assert not list(tmp_path.iterdir())
