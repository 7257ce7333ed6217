"""Content hashes of files and arrays."""

from pathlib import Path

import numpy as np
import xxhash

PIECE = 1 << 24
"""Bytes read at a time."""


def fingerprint(path: Path) -> str:
    """Hash of a file's content, which is read piece by piece."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def array_fingerprint(array: np.ndarray) -> str:
    """Hash of an array's dtype, shape and content."""
    digest = xxhash.xxh3_128(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
