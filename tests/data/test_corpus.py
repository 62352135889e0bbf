"""Where documents come from: order, globs, standard input, and shards that lose and repeat nothing."""

import io
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.data import corpus as module
from megatron_ring.data.corpus import Corpus, gather, keep_pipes, python_library
from megatron_ring.data.documents import Reading
from megatron_ring.errors import DataError


def texts(corpus: Corpus) -> list[str]:
    return [text for shard in corpus.shards() for text in corpus.reading.texts(shard, [])]


def test_a_folder_is_read_to_the_bottom_and_in_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path])) == ["a/b/c.py", "a/z.md", "b.txt"]
    assert texts(gather([tmp_path], suffixes=[".png"])) == ["a/picture.png"]


def test_files_come_in_the_order_given_whatever_their_suffix(tmp_path):
    for name in ("two.tex", "one"):
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path / "two.tex", tmp_path / "one"])) == ["two.tex", "one"]


def test_text_is_taken_exactly_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one\r\n\ttwo \n\n")
    assert texts(gather([tmp_path])) == ["\ufeff one\r\n\ttwo \n\n"]


def test_a_line_of_jsonl_is_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n", "id": 1}\n\n{"text": "two"}')
    assert texts(gather([tmp_path])) == ["one\n", "two"]


def test_json_key_names_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    assert texts(gather([tmp_path], reading=Reading("content"))) == ["one"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n')
    assert texts(gather([tmp_path])) == ["b"]


def test_the_python_library_is_source_text_without_tests():
    library = python_library()
    names = {file.name for file in library.files}
    assert {"argparse.py", "dataclasses.py", "_pydecimal.py"} <= names
    folders = {file.parent.name for file in library.files}
    assert {"asyncio", "encodings"} <= folders
    assert not {"test", "tests", "idle_test", "site-packages"} & folders
    assert list(library.files) == sorted(library.files)
    assert library.file_bytes > 5_000_000


def test_a_python_without_source_text_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"comes without its source text \(\*\.py\)\. Set --data-path"):
        python_library()


def test_every_missing_input_is_named_at_once(tmp_path):
    with pytest.raises(DataError, match=r"(?s)input .*/one does not exist.*input .*/two does not exist\. Set --input"):
        gather([tmp_path / "one", tmp_path / "two"])


def test_a_folder_without_text_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"has no file named \*\.txt, \*\.md\. Set --suffixes"):
        gather([tmp_path], suffixes=[".txt", ".md"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt cannot be read: No such file or directory\. Set --input"):
        texts(Corpus((tmp_path / "gone.txt",)))


def test_a_glob_is_searched_to_the_bottom_and_in_order(tmp_path):
    for name in ("b.txt", "a/b/c.txt", "a/z.txt", "a/z.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path / "**" / "*.txt"])) == ["a/b/c.txt", "a/z.txt", "b.txt"]


def test_a_file_named_like_a_glob_is_itself(tmp_path):
    (tmp_path / "[a].txt").write_text("one")
    assert texts(gather([tmp_path / "[a].txt"])) == ["one"]


def test_a_glob_that_finds_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"input .*/\*\.txt does not exist\. Set --input"):
        gather([tmp_path / "*.txt"])


def test_standard_input_is_kept_to_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"text": "one"}\n')))
    kept = keep_pipes(["-"], tmp_path / "P.work", ".jsonl")
    assert texts(gather(kept)) == texts(gather(kept)) == ["one"]


def test_what_is_skipped_is_told_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nrubbish\n{"text": "two"}\n{}\n')
    corpus = gather([tmp_path], reading=Reading(on_error="skip"))
    skipped: list[str] = []
    assert list(corpus.reading.texts(*corpus.shards(), skipped)) == ["one", "two"]
    assert [problem.split(": ")[0] for problem in skipped] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:4"]


def test_a_file_that_is_gone_is_never_skipped(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        texts(Corpus((tmp_path / "gone.txt",), Reading(on_error="skip")))


@settings(max_examples=100)
@given(
    lines=st.lists(st.text(st.sampled_from("aä\n\r ")), max_size=8),
    shard_bytes=st.integers(1, 60),
    bad=st.integers(0, 8),
)
def test_shards_of_any_size_have_every_line_once_and_name_the_right_one(tmp_path_factory, lines, shard_bytes, bad):
    file = tmp_path_factory.getbasetemp() / "lines.jsonl"
    written = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    written.insert(bad, "rubbish")
    file.write_text("\n".join(written))
    corpus = gather([file], reading=Reading(on_error="skip"))
    skipped: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_BYTES", shard_bytes)
        shards = corpus.shards()
        read = [text for shard in shards for text in corpus.reading.texts(shard, skipped)]
    assert read == [line for line in lines if line]
    assert [problem.split(": ")[0] for problem in skipped] == [f"{file}:{min(bad, len(lines)) + 1}"]
    assert sum(piece.stop - piece.start for shard in shards for piece in shard) == corpus.file_bytes


def test_small_files_share_a_shard_and_large_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 10)
    for name, size in (("a", 4), ("b", 4), ("c", 30), ("d", 4)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    shards = [[piece.file.stem for piece in shard] for shard in gather([tmp_path]).shards()]
    assert shards == [["a", "b", "c"], ["d"]]
