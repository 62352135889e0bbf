"""The fingerprint of a token store: whether a resumed run reads the same tokens, in bounded time at any size.

A checkpoint keeps the fingerprint of every store that its run has read. It does not depend on the
store's path, so a store that was moved or copied has the same one.
"""

import hashlib
import os
from pathlib import Path

from megatron_ring.data.manifest import read_manifest
from megatron_ring.data.token_index import idx_path, read_counts
from megatron_ring.data.tokens import bin_path
from megatron_ring.errors import DataError
from megatron_ring.untrusted import UntrustedInputError, open_regular

# Preparing a store anew from other text moves nearly every token in it, so that a few blocks
# anywhere differ. A store of terabytes costs no more reads than one of gigabytes, and a blend of
# 500 stores 8,000 reads.
_BLOCKS = 8
_BLOCK_BYTES = 64 << 10

Fingerprint = dict[str, str | int]


def fingerprint(prefix: str | Path) -> Fingerprint:
    """Return what identifies the tokens of the store ``prefix``, as plain values for a checkpoint.

    ``documents`` and ``tokens`` are counts, ``sampled_sha256`` is of blocks at equal distances of
    P.bin and P.idx, and ``manifest_sha256`` of the counts and the tokenizer in P.json, "" where a
    store has none. Raises DataError where the store cannot be read.
    """
    try:
        dtype, documents = read_counts(prefix)
        return {
            "prefix": str(prefix),
            "documents": documents,
            "tokens": bin_path(prefix).stat().st_size // dtype.itemsize,
            "sampled_sha256": _sampled_sha256(bin_path(prefix), idx_path(prefix)),
            "manifest_sha256": _manifest_sha256(prefix),
        }
    except (OSError, UntrustedInputError) as error:
        raise DataError(
            f"token store {prefix} cannot be read: {error}. Set --data-path."
        ) from error


def _sampled_sha256(*paths: Path) -> str:
    """Hash each file's size and its content: all of it, or blocks at equal distances, both ends included."""
    digest = hashlib.sha256()
    for path in paths:
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            digest.update(size.to_bytes(8, "little"))
            last = max(0, size - _BLOCK_BYTES)
            few = size <= _BLOCKS * _BLOCK_BYTES
            offsets = (
                range(0, size, _BLOCK_BYTES)
                if few
                else [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
            )
            for offset in offsets:
                digest.update(os.pread(descriptor, _BLOCK_BYTES, offset))
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def _manifest_sha256(prefix: str | Path) -> str:
    """Hash what a manifest states of the text; later versions may add keys, which are not of the data."""
    manifest = read_manifest(prefix)
    if manifest is None:
        return ""
    stated = (manifest.tokenizer_sha256, manifest.documents, manifest.tokens, manifest.bytes)
    return hashlib.sha256(repr(stated).encode()).hexdigest()
