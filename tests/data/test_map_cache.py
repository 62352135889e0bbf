"""The cache of memory maps: how many stay open, and the error at the limit on open files."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data.map_cache import MapCache
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from megatron_ring.errors import DataError


def write_store(folder: Path, number: int) -> Path:
    """Write a store of the one document [number, number + 1]."""
    prefix = folder / str(number)
    with TokenStoreWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document([number, number + 1])
    return prefix


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_open_files():
    """An open-file limit of ten descriptors more than this process has."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_store_holds_one_descriptor(tmp_path):
    before = count_descriptors()
    store = TokenStore(write_store(tmp_path, 1))
    assert count_descriptors() == before + 1
    assert store.document(0).tolist() == [1, 2]


@pytest.mark.parametrize("limit", [1, 3])
def test_stores_that_share_a_cache_keep_at_most_its_limit_open(tmp_path, limit):
    before = count_descriptors()
    maps = MapCache(limit)
    stores = [TokenStore(write_store(tmp_path, number), maps) for number in range(9)]
    for _ in range(2):
        assert [store.document(0).tolist() for store in stores] == [[n, n + 1] for n in range(9)]
    assert len(maps) == limit
    assert count_descriptors() == before + limit


def test_the_maps_read_most_recently_stay_open(tmp_path):
    maps = MapCache(2)
    first, second, third = (TokenStore(write_store(tmp_path, number), maps) for number in range(3))
    for store in (second, third, second, first):
        store.document(0)
    for store in (first, second):
        Path(f"{store.prefix}.bin").unlink()
        assert len(store.document(0)) == 2
    third.document(0)
    with pytest.raises(DataError, match=r"0\.bin cannot be read"):
        first.document(0)


def test_a_document_outlives_its_map_and_can_still_be_located(tmp_path):
    maps = MapCache(1)
    first, second = (TokenStore(write_store(tmp_path, number), maps) for number in range(2))
    kept = first.document(0)
    second.document(0)
    first.document(0)
    assert kept.tolist() == [0, 1]
    assert "document 0 at byte 2" in first.where(kept[1:])


def test_a_store_that_was_rewritten_is_not_read_with_its_old_index(tmp_path):
    maps = MapCache(1)
    first, second = (TokenStore(write_store(tmp_path, number), maps) for number in range(2))
    os.utime(write_store(tmp_path, 0).with_suffix(".bin"), ns=(1, 1))
    second.document(0)
    with pytest.raises(DataError, match=r"0\.bin was rewritten.*--output-prefix"):
        first.document(0)


def test_a_store_that_was_truncated_while_its_map_was_closed_is_refused(tmp_path):
    maps = MapCache(1)
    first, second = (TokenStore(write_store(tmp_path, number), maps) for number in range(2))
    os.truncate(f"{first.prefix}.bin", 2)
    second.document(0)
    with pytest.raises(DataError, match=r"0\.bin was rewritten.*2 bytes now and 4"):
        first.document(0)


def test_more_stores_than_the_open_file_limit_can_be_read(tmp_path, request):
    """Maps are closed when a map or the index of another store reaches the limit."""
    prefixes = [write_store(tmp_path, number) for number in range(30)]
    request.getfixturevalue("few_open_files")
    maps = MapCache(limit=30)
    stores = [TokenStore(prefix, maps) for prefix in prefixes]
    assert [int(store.document(0)[0]) for store in stores] == list(range(30))


@pytest.mark.usefixtures("few_open_files")
def test_the_error_at_the_open_file_limit_has_its_remedy(tmp_path):
    prefix = write_store(tmp_path, 0)
    others = []
    try:
        while True:
            others.append(open(os.devnull))  # noqa: SIM115
    except OSError:
        with pytest.raises(DataError, match=r"ulimit -n \d+.*--data-path"):
            TokenStore(prefix)
    finally:
        for other in others:
            other.close()


@pytest.mark.parametrize("protected", ["file", "folder"])
def test_a_file_or_folder_without_permission_is_a_data_error(tmp_path, protected):
    store_folder = tmp_path / "store"
    store_folder.mkdir()
    prefix = write_store(store_folder, 0)
    path = Path(f"{prefix}.bin") if protected == "file" else store_folder
    path.chmod(0)
    # Root may read every file, so root opens the store as another user.
    code = (
        "import os, sys\n"
        "from megatron_ring.data.tokens import TokenStore\n"
        "from megatron_ring.errors import DataError\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: TokenStore(sys.argv[1])\n"
        "except DataError as error:\n"
        "    sys.exit(error.exit_code if 'cannot be read' in str(error) else str(error))\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    process = subprocess.run([sys.executable, "-c", code, str(prefix)])
    path.chmod(0o755)
    assert process.returncode == DataError.exit_code
