"""Entries of JAX's cache of compiled programs: always written whole, and replaced when damaged."""

import contextlib
import functools
import os
import uuid
from pathlib import Path


@functools.cache
def keep_entries_whole() -> None:
    """From now on let JAX write each entry under another name first, and forget an entry that cannot be decompressed.

    By itself JAX writes an entry in place, so that another process may read half of it; and an entry that a killed
    process has cut short stays: it is a warning and a compilation in every later run. There is no public way to change
    that. Where a version of JAX has no such class, or limits the cache's size (JAX_COMPILATION_CACHE_MAX_SIZE, with
    locks of its own), entries are written as JAX does.
    """
    try:
        from jax._src.compilation_cache import decompress_executable
        from jax._src.lru_cache import LRUCache

        get, put = LRUCache.get, LRUCache.put
    except (ImportError, AttributeError):
        return

    def get_whole(cache, key: str) -> bytes | None:
        value = get(cache, key)
        try:
            if value is not None:
                decompress_executable(value)
        except Exception:
            # zlib and zstandard have errors of their own.
            with contextlib.suppress(OSError):
                _path(cache, key).unlink()
            return None
        return value

    def put_whole(cache, key: str, value: bytes) -> None:
        if cache.eviction_enabled:
            return put(cache, key, value)
        path = _path(cache, key)
        if path.exists():
            return
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            partial.write_bytes(value)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    LRUCache.get, LRUCache.put = get_whole, put_whole


def _path(cache, key: str) -> Path:
    return Path(os.fspath(cache.path)) / f"{key}-cache"
