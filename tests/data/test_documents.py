"""Where documents come from: order, exactness, and the file and line of what cannot be read."""

import json

import pytest

from megatron_ring.data.documents import Corpus, gather, python_library
from megatron_ring.errors import DataError


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


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
    assert texts(gather([tmp_path], json_key="content")) == ["one"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n')
    assert texts(gather([tmp_path])) == ["b"]


def test_the_bytes_of_documents_add_up_to_those_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("ä" * 10)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "ä" * 10}) + "\n" + json.dumps({"text": "b"}))
    corpus = gather([tmp_path])
    assert sum(document.file_bytes for document in corpus.documents()) == corpus.file_bytes


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


def test_text_that_is_not_utf8_is_named_by_file_and_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ngrün\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:3: byte 0xfc is not UTF-8"):
        texts(gather([tmp_path]))


BAD_LINES = {
    "not json": (b"{'text': 1}", "not a line of JSON: .*Every line of a .jsonl file is one object"),
    "not an object": (b'["text"]', "no text under 'text'; found list. Set --json-key"),
    "another key": (b'{"content": "a", "id": 1}', "no text under 'text'; found 'content', 'id'. Set --json-key"),
    "not a string": (b'{"text": 5}', "no text under 'text'; found 'text'"),
    "not UTF-8": (b'{"text": "\xfc"}', "byte 0xfc is not UTF-8"),
    "half a surrogate pair": (b'{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        texts(gather([tmp_path]))
