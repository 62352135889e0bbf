"""The corpus: order, globs, pipes, and shards that neither lose nor repeat a document."""

import bz2
import glob
import gzip
import io
import json
import os
from collections import Counter
from threading import Thread
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.data import corpus as module
from megatron_ring.data.corpus import Corpus, copy_pipes, gather, python_library
from megatron_ring.data.documents import Reading
from megatron_ring.errors import DataError


def texts(corpus: Corpus) -> list[str]:
    return [text for shard in corpus.shards() for text in corpus.reading.texts(shard, [])]


def test_a_folder_is_read_with_subfolders_and_in_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path])) == ["a/b/c.py", "a/z.md", "b.txt"]
    assert texts(gather([tmp_path], suffixes=[".png"])) == ["a/picture.png"]


def test_named_files_are_read_in_the_given_order_with_any_suffix(tmp_path):
    for name in ("two.tex", "one"):
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path / "two.tex", tmp_path / "one"])) == ["two.tex", "one"]


def test_text_is_read_exactly(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one\r\n\ttwo \n\n")
    assert texts(gather([tmp_path])) == ["\ufeff one\r\n\ttwo \n\n"]


def test_each_line_of_jsonl_is_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n", "id": 1}\n\n{"text": "two"}')
    assert texts(gather([tmp_path])) == ["one\n", "two"]


def test_json_key_selects_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    assert texts(gather([tmp_path], reading=Reading("content"))) == ["one"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n')
    assert texts(gather([tmp_path])) == ["b"]


def test_the_python_library_is_source_text_without_tests():
    library = python_library()
    names = {file.name for file in library.files}
    folders = {file.parent.name for file in library.files}
    assert {"argparse.py", "dataclasses.py", "_pydecimal.py"} <= names
    assert {"asyncio", "encodings"} <= folders
    assert not {"test", "tests", "idle_test", "site-packages"} & folders
    assert list(library.files) == sorted(library.files)
    assert library.file_bytes > 5_000_000


def test_a_python_without_source_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no source text \(\*\.py\)\. Set --data-path"):
        python_library()


def test_all_missing_inputs_are_named_in_one_error(tmp_path):
    with pytest.raises(
        DataError,
        match=r"(?s)input .*/one does not exist.*input .*/two does not exist\. Set --input",
    ):
        gather([tmp_path / "one", tmp_path / "two"])


def test_the_error_for_a_folder_without_text_lists_the_suffixes(tmp_path):
    with pytest.raises(DataError, match=r"has no file named \*\.txt, \*\.md\. Set --suffixes"):
        gather([tmp_path], suffixes=[".txt", ".md"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"gone\.txt cannot be read: No such file or directory\. Set --input"
    ):
        texts(Corpus((tmp_path / "gone.txt",)))


def test_a_recursive_glob_is_searched_with_subfolders_and_in_order(tmp_path):
    for name in ("b.txt", "a/b/c.txt", "a/z.txt", "a/z.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path / "**" / "*.txt"])) == ["a/b/c.txt", "a/z.txt", "b.txt"]


def test_an_existing_file_named_like_a_glob_is_read(tmp_path):
    (tmp_path / "[a].txt").write_text("one")
    assert texts(gather([tmp_path / "[a].txt"])) == ["one"]


def test_a_glob_without_matches_is_named(tmp_path):
    with pytest.raises(DataError, match=r"input .*/\*\.txt does not exist\. Set --input"):
        gather([tmp_path / "*.txt"])


def test_standard_input_is_copied_so_that_it_can_be_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"text": "one"}\n')))
    copied = copy_pipes(["-"], tmp_path / "P.work", ".jsonl")
    assert texts(gather(copied)) == texts(gather(copied)) == ["one"]


def test_skipped_documents_are_reported_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nrubbish\n{"text": "two"}\n{}\n')
    corpus = gather([tmp_path], reading=Reading(on_error="skip"))
    skipped: list[str] = []
    assert list(corpus.reading.texts(*corpus.shards(), skipped)) == ["one", "two"]
    assert [problem.split(": ")[0] for problem in skipped] == [
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/a.jsonl:4",
    ]


def test_a_missing_file_is_never_skipped(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        texts(Corpus((tmp_path / "gone.txt",), Reading(on_error="skip")))


@settings(max_examples=100)
@given(
    lines=st.lists(st.text(st.sampled_from("aä\n\r ")), max_size=8),
    shard_bytes=st.integers(1, 60),
    bad=st.integers(0, 8),
)
def test_shards_of_any_size_have_every_line_once_and_number_bad_ones_correctly(
    tmp_path_factory, lines, shard_bytes, bad
):
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


@pytest.mark.parametrize("longest", [20, 40])
def test_a_line_longer_than_a_shard_is_reported_once_and_the_others_are_read(
    tmp_path, monkeypatch, longest
):
    monkeypatch.setattr(module, "SHARD_BYTES", 25)
    written = ["one", "x" * 200, "two", "y" * 100, "three"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in written))
    corpus = gather([tmp_path], reading=Reading(on_error="skip", max_document_bytes=longest))
    skipped: list[str] = []
    shards = corpus.shards()
    assert len(shards) > 10
    assert [text for shard in shards for text in corpus.reading.texts(shard, skipped)] == [
        "one",
        "two",
        "three",
    ]
    assert [problem.split(": ")[0] for problem in skipped] == [
        f"{tmp_path}/a.jsonl:{line}" for line in (2, 4)
    ]


RECORDS = b'{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n'


@pytest.mark.parametrize(
    "name", ["a.json", "a.ndjson", "a.jsonlines", "a.JSONL", "a.Json", "a.jsonl"]
)
@pytest.mark.parametrize("compress", [None, gzip.compress])
def test_json_lines_with_any_suffix_are_found_in_a_folder(tmp_path, name, compress):
    file = tmp_path / (name if compress is None else f"{name}.gz")
    file.write_bytes(RECORDS if compress is None else compress(RECORDS))
    assert texts(gather([tmp_path])) == texts(gather([file])) == ["one", "two"]


@pytest.mark.parametrize("name", ["part-00000", "a.txt", "a.dat"])
def test_json_lines_with_other_names_are_recognized_by_content(tmp_path, name):
    (tmp_path / name).write_bytes(RECORDS)
    assert texts(gather([tmp_path / name])) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.json", "part-00000", "a.NDJSON"])
def test_large_json_lines_with_any_name_are_cut_into_shards(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "SHARD_BYTES", 10)
    (tmp_path / name).write_bytes(RECORDS)
    assert len(gather([tmp_path / name]).shards()) == 5
    assert texts(gather([tmp_path / name])) == ["one", "two"]


@pytest.mark.parametrize("content", [b'[{"text": "one"}]', b'{\n "text": "one"\n}'])
def test_json_of_one_value_is_refused_if_named_and_counted_in_a_folder(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is one JSON value .*jq -c"):
        gather([tmp_path / "a.json"])
    left_out = Counter()
    corpus = gather([tmp_path])
    assert list(corpus.reading.texts(*corpus.shards(), [], left_out)) == []
    assert left_out == {"*.json that are not JSON lines": 1}


@pytest.mark.parametrize(
    "name", ["a.7z", "a.rar", "a.npy", "a.pdf", "a.docx", "a.jsonl.lz4", "a.txt.br"]
)
def test_files_that_are_not_text_are_refused_if_named_and_counted_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(
        {".npy": b"\x93NUMPY\1", ".pdf": b"%PDF-1.4"}.get(name[1:], b"\0\1\2")
    )
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=rf"{name} is .*--input"):
        gather([tmp_path / name, tmp_path / "b.txt"])
    corpus = gather([tmp_path])
    assert texts(corpus) == ["b"]
    assert corpus.left_out == {f"*.{name.split('.')[-1]}": 1}


def test_files_left_out_of_a_folder_are_counted_by_kind(tmp_path):
    for name in ("a.png", "b.PNG", "c.png.gz", "README", "d.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").write_text("")
    os.mkfifo(tmp_path / "pipe.jsonl")
    corpus = gather([tmp_path])
    assert [file.name for file in corpus.files] == ["d.txt"]
    assert corpus.left_out == {
        "*.png": 3,
        "files without a suffix": 1,
        "empty files": 1,
        "pipes, sockets and devices in folders": 1,
    }


def test_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    left_out = Counter()
    corpus = gather([tmp_path])
    assert list(corpus.reading.texts(*corpus.shards(), [], left_out)) == ["a"]
    assert left_out == {"empty documents": 2}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.zip", "a.tar", "a.parquet"])
def test_an_empty_file_of_a_format_that_has_a_header_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{name} is damaged: it is empty"):
            gather([path])


def test_linked_folders_are_read_once_and_under_their_own_name_if_inside_the_input(tmp_path):
    for name in ("in/b/b.txt", "out/c.txt", "out/deep/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/a").symlink_to("b")  # the same folder, under an earlier name
    (tmp_path / "in/z").symlink_to(tmp_path / "out")
    (tmp_path / "in/y").symlink_to(tmp_path / "out/deep")
    (tmp_path / "in/b/up").symlink_to("..")  # a cycle
    (tmp_path / "in/f.txt").symlink_to(
        tmp_path / "out/c.txt"
    )  # links to files are not deduplicated
    corpus = gather([tmp_path / "in"])
    assert [str(file.relative_to(tmp_path / "in")) for file in corpus.files] == [
        "b/b.txt",
        "f.txt",
        "y/d.txt",
        "z/c.txt",
    ]
    assert corpus.left_out == {"linked folders and files reached twice": 3}
    # A glob reads the linked folders too.
    assert sorted(set(texts(gather([tmp_path / "in" / "**" / "*.txt"])))) == [
        "in/b/b.txt",
        "out/c.txt",
        "out/deep/d.txt",
    ]


def test_cyclic_links_do_not_make_a_glob_read_a_file_twice(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    for number in range(3):
        (tmp_path / "a" / f"again{number}").symlink_to(".")
    assert texts(gather([tmp_path / "**" / "*.txt"])) == ["one"]


@pytest.mark.parametrize(
    "pattern", ["**", "**/*", "**/*.txt", "*/**/*.txt", "a/**", "**/b/*", "**/.h/*", "[ab]/**/c*"]
)
def test_a_recursive_glob_matches_what_pythons_does(tmp_path, monkeypatch, pattern):
    for name in ("a/b/c.txt", "a/c.txt", "c.txt", ".h/c.txt", "a/.c.txt", "b/b/b/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    matches = sorted(glob.glob(str(tmp_path / pattern), recursive=True))
    expected = [match for match in matches if os.path.isfile(match)]
    assert [str(file) for file in gather([tmp_path / pattern]).files] == expected
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(file) for file in expected]
    assert [str(file) for file in gather([pattern]).files] == relative


def test_folders_that_match_a_glob_are_read(tmp_path):
    for name in ("part1/a.txt", "part2/deep/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(gather([tmp_path / "*"])) == ["c.txt", "part1/a.txt", "part2/deep/b.txt"]


@pytest.mark.parametrize("target", ["gone", "broken.jsonl"])
def test_a_broken_link_is_refused(tmp_path, target):
    (tmp_path / "broken.jsonl").symlink_to(target)
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path, tmp_path / "broken.jsonl", tmp_path / "*"):
        with pytest.raises(
            DataError, match=rf"broken\.jsonl is a link to {target}, which does not exist"
        ):
            gather([path])


def test_a_device_is_refused():
    with pytest.raises(DataError, match="/dev/null is neither a file nor a folder"):
        gather(["/dev/null"])


@pytest.mark.parametrize(
    "content",
    [RECORDS, gzip.compress(RECORDS), bz2.compress(RECORDS)],
    ids=["plain", "gzip", "bzip2"],
)
def test_named_pipes_are_copied_and_recognized_by_content(tmp_path, content):
    (tmp_path / "a.txt").write_text("a")
    for name in ("pipe", "other.jsonl"):
        os.mkfifo(tmp_path / name)
        Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True).start()
    inputs = [str(tmp_path / name) for name in ("pipe", "a.txt", "other.jsonl")]
    copied = copy_pipes(inputs, tmp_path / "P.work", ".jsonl")
    assert texts(gather(copied)) == ["one", "two", "a", "one", "two"]


def test_standard_input_named_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"standard input \(-\) .*--input"):
        copy_pipes(["-", "a", "-"], tmp_path, ".jsonl")


def test_small_files_share_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 10)
    for name, size in (("a", 4), ("b", 4), ("c", 30), ("d", 4)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    shards = [[piece.file.stem for piece in shard] for shard in gather([tmp_path]).shards()]
    assert shards == [["a", "b", "c"], ["d"]]
