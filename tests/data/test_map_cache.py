"""Maps of token stores under the limit on open files: how many stay open, and what is said at the limit."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data.map_cache import OpenMaps
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from megatron_ring.errors import DataError


def written(folder: Path, number: int) -> Path:
    """A store of the one document [number, number + 1]."""
    prefix = folder / str(number)
    with TokenStoreWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document([number, number + 1])
    return prefix


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_open_files():
    """A limit that leaves this process ten descriptors more than it has."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, limits[1])
    )
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_store_has_one_descriptor(tmp_path):
    before = descriptors()
    store = TokenStore(written(tmp_path, 1))
    assert descriptors() == before + 1
    assert store.document(0).tolist() == [1, 2]


@pytest.mark.parametrize("limit", [1, 3])
def test_stores_that_share_maps_keep_no_more_open_and_give_the_same_documents(tmp_path, limit):
    before, maps = descriptors(), OpenMaps(limit)
    stores = [TokenStore(written(tmp_path, number), maps) for number in range(9)]
    for _ in range(2):
        assert [store.document(0).tolist() for store in stores] == [[n, n + 1] for n in range(9)]
    assert len(maps) == limit
    assert descriptors() == before + limit


def test_what_was_read_last_stays_open(tmp_path):
    maps = OpenMaps(2)
    first, second, third = (TokenStore(written(tmp_path, number), maps) for number in range(3))
    second.document(0), third.document(0), second.document(0), first.document(0)
    for store in (first, second):
        Path(f"{store.prefix}.bin").unlink()
        assert len(store.document(0)) == 2
    with pytest.raises(DataError, match=r"0\.bin cannot be read"):
        third.document(0), first.document(0)


def test_a_document_outlives_its_map_and_can_still_be_named(tmp_path):
    maps = OpenMaps(1)
    first, second = (TokenStore(written(tmp_path, number), maps) for number in range(2))
    kept = first.document(0)
    second.document(0), first.document(0)
    assert kept.tolist() == [0, 1]
    assert "document 0 at byte 2" in first.where(kept[1:])


def test_a_store_that_was_written_again_is_not_mixed_with_its_old_index(tmp_path):
    maps = OpenMaps(1)
    first, second = (TokenStore(written(tmp_path, number), maps) for number in range(2))
    os.utime(written(tmp_path, 0).with_suffix(".bin"), ns=(1, 1))
    with pytest.raises(DataError, match=r"0\.bin was written again.*--output-prefix"):
        second.document(0), first.document(0)


def test_a_store_that_was_cut_while_its_map_was_closed_is_refused(tmp_path):
    maps = OpenMaps(1)
    first, second = (TokenStore(written(tmp_path, number), maps) for number in range(2))
    os.truncate(f"{first.prefix}.bin", 2)
    with pytest.raises(DataError, match=r"0\.bin was written again.*2 bytes now and 4"):
        second.document(0), first.document(0)


def test_more_stores_than_open_files(tmp_path, request):
    """Maps are closed when the limit is met, whether by a map or by the index of another store."""
    prefixes = [written(tmp_path, number) for number in range(30)]
    request.getfixturevalue("few_open_files")
    maps = OpenMaps(limit=30)
    stores = [TokenStore(prefix, maps) for prefix in prefixes]
    assert [int(store.document(0)[0]) for store in stores] == list(range(30))


@pytest.mark.usefixtures("few_open_files")
def test_the_limit_itself_is_one_error_with_its_remedy(tmp_path):
    prefix = written(tmp_path, 0)
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


def test_a_file_without_permission_is_one_error(tmp_path):
    prefix = written(tmp_path, 0)
    Path(f"{prefix}.bin").chmod(0)
    # Root may read every file, so the store is opened by another user where there is one.
    code = (
        "import os, sys\n"
        "from megatron_ring.data.tokens import TokenStore\n"
        "from megatron_ring.errors import DataError\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: TokenStore(sys.argv[1])\n"
        "except DataError as error: sys.exit(error.exit_code if 'cannot be read' in str(error) else str(error))\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    assert (
        subprocess.run([sys.executable, "-c", code, str(prefix)]).returncode == DataError.exit_code
    )
