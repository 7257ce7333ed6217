"""Entries of the cache of compiled programs."""

import os
import zlib
from pathlib import Path

import pytest
from jax._src.compilation_cache import compress_executable
from jax._src.lru_cache import LRUCache

from barber_jax.devices.compiled import keep_entries_whole

VALUE = compress_executable(b"0123a program" * 1000)


@pytest.fixture
def cache(tmp_path):
    keep_entries_whole()
    return LRUCache(str(tmp_path), max_size=-1)


def entry(cache, key="key"):
    return Path(os.fspath(cache.path)) / f"{key}-cache"


def test_an_entry_has_its_name_only_when_it_is_whole(cache, monkeypatch):
    seen = []
    write, replace = Path.write_bytes, os.replace

    def partly(path, value):
        write(path, value[:10])
        seen.append(cache.get("key"))
        write(path, value)

    def checked(source, target):
        assert Path(source).read_bytes() == VALUE
        replace(source, target)

    monkeypatch.setattr(Path, "write_bytes", partly)
    monkeypatch.setattr(os, "replace", checked)
    cache.put("key", VALUE)
    assert seen == [None] and cache.get("key") == VALUE
    assert os.listdir(cache.path) == ["key-cache"]


def test_a_full_disk_leaves_nothing(cache, monkeypatch):
    def full(path, value):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        cache.put("key", VALUE)
    assert os.listdir(cache.path) == []


@pytest.mark.parametrize("content", [b"", VALUE[:-5], VALUE[:20], b"garbage", VALUE[:30] + b"?" + VALUE[31:]])
def test_a_damaged_entry_is_forgotten_and_written_again(content, cache):
    entry(cache).write_bytes(content)
    assert cache.get("key") is None and not entry(cache).exists()
    cache.put("key", VALUE)
    assert cache.get("key") == VALUE


def test_an_entry_that_exists_stays(cache):
    cache.put("key", VALUE)
    cache.put("key", zlib.compress(b"another"))
    assert cache.get("key") == VALUE


def test_a_cache_of_limited_size_is_left_to_jax(tmp_path):
    keep_entries_whole()
    limited = LRUCache(str(tmp_path), max_size=10**6)
    limited.put("key", VALUE)
    assert limited.get("key") == VALUE
    assert (tmp_path / "key-atime").exists()
