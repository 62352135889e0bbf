"""Fingerprint a token store, to check that a resumed run reads the same tokens.

The cost is bounded at any store size. A checkpoint keeps the fingerprint of every store that its
run has read. The fingerprint does not depend on the store's path, so a store that was moved or
copied keeps it.
"""

import hashlib
import os
from pathlib import Path

from megatron_ring.data.manifest import read_manifest
from megatron_ring.data.token_index import idx_path, read_counts
from megatron_ring.data.tokens import bin_path
from megatron_ring.errors import DataError
from megatron_ring.untrusted import UntrustedInputError, open_regular

# Preparing a store from other text moves nearly every token in it, so that a few blocks anywhere
# differ. A store of terabytes costs no more reads than one of gigabytes, and a blend of 500 stores
# 8,000 reads.
_BLOCKS = 8
_BLOCK_BYTES = 64 << 10

Fingerprint = dict[str, str | int]


def fingerprint(prefix: str | Path) -> Fingerprint:
    """Return what identifies the tokens of the store ``prefix``, as plain values for a checkpoint.

    ``documents`` and ``tokens`` are counts, ``sampled_sha256`` is the hash of evenly spaced blocks
    of P.bin and P.idx, and ``manifest_sha256`` the hash of the counts and the tokenizer in P.json,
    "" for a store without one. Raises DataError where the store cannot be read.
    """
    try:
        dtype, documents = read_counts(prefix)
        return {
            "prefix": str(prefix),
            "documents": documents,
            "tokens": bin_path(prefix).stat().st_size // dtype.itemsize,
            "sampled_sha256": _sampled_sha256(bin_path(prefix), idx_path(prefix)),
            "manifest_sha256": manifest_sha256(prefix),
        }
    except (OSError, UntrustedInputError) as error:
        raise DataError(
            f"token store {prefix} cannot be read: {error}. Set --data-path."
        ) from error


def _sampled_sha256(*paths: Path) -> str:
    """Hash each file's size and its content: all of it, or evenly spaced blocks with both ends."""
    digest = hashlib.sha256()
    for path in paths:
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            digest.update(size.to_bytes(8, "little"))
            for offset in _block_offsets(size):
                digest.update(os.pread(descriptor, _BLOCK_BYTES, offset))
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def _block_offsets(size: int) -> list[int]:
    if size <= _BLOCKS * _BLOCK_BYTES:
        return list(range(0, size, _BLOCK_BYTES))
    last = size - _BLOCK_BYTES
    return [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)]


def manifest_sha256(prefix: str | Path) -> str:
    """Return the hash of what a store's manifest records about the text; "" without one.

    Only these fields are hashed, so that later versions may add keys about other things.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return ""
    hashed = (manifest.tokenizer_sha256, manifest.documents, manifest.tokens, manifest.bytes)
    return hashlib.sha256(repr(hashed).encode()).hexdigest()
