"""Writes a safetensors file tensor by tensor, in any order, so that a file may be larger than memory.

The `safetensors` package needs all tensors of a file at once. The format itself does not: names, shapes and dtypes
determine every offset, so the header is written first and each tensor at its offset as soon as it is ready.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from barber_jax.console.errors import BarberError

DTYPE_NAMES: dict[np.dtype, str] = {
    np.dtype(dtype): name
    for dtype, name in [
        (np.bool_, "BOOL"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        ("<i2", "I16"),
        ("<u2", "U16"),
        ("<i4", "I32"),
        ("<u4", "U32"),
        ("<i8", "I64"),
        ("<u8", "U64"),
        ("<f2", "F16"),
        ("<f4", "F32"),
        ("<f8", "F64"),
        (ml_dtypes.bfloat16, "BF16"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
    ]
}

_ADVICE = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some of the quota or write to another disk",
    errno.EFBIG: "raise the file-size limit (ulimit -f) or write to another file system",
    errno.EACCES: "write to a folder that you own",
    errno.ENOENT: "create the folder first",
}
# Errors of a file system that cannot reserve space.
_NO_RESERVATION = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


class SafetensorsWriter:
    """A safetensors file open for writing; a context manager.

    The content is written to `<path>.partial`, which `close` renames: since space is reserved at once, an unfinished
    file would otherwise look complete and read as zeros. An exception in the `with` block removes the partial file.

    Args:
        path: the file to create or replace.
        tensors: name -> (dtype, shape) of every tensor that will be written.
        metadata: the header's `__metadata__`, with string keys and values.

    Raises:
        BarberError: the file cannot be created, or there is no room for it.
        ValueError: a dtype that safetensors does not support, a reserved name, or metadata that are not strings.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._specs = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()}
        header, self._offsets, size = _layout(self._specs, dict(metadata or {}))
        self._unwritten = set(self._specs)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = -1
        with self._reporting_os_errors():
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._stat = os.fstat(self._file)
        try:
            with self._reporting_os_errors():
                _reserve(self._file, size)
                _write_all(self._file, header, 0)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor, of the declared dtype and shape, at its offset. A C-contiguous array is not copied.

        Raises:
            BarberError: the disk, the quota or the file-size limit is exhausted.
            ValueError: the name is unknown or already written, or dtype or shape differ from the declared ones.
        """
        if self._file < 0:
            raise ValueError(f"{self.path} is closed")
        if name not in self._specs:
            raise ValueError(f"{self.path} has no tensor {name}")
        if name not in self._unwritten:
            raise ValueError(f"{self.path}: tensor {name} is already written")
        dtype, shape = self._specs[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{self.path}: tensor {name} is {array.dtype}{array.shape}, declared as {dtype}{shape}")
        with self._reporting_os_errors():
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            _write_all(self._file, memoryview(content), self._offsets[name])
        self._unwritten.remove(name)

    def close(self) -> None:
        """Finish the file and rename it to its final name. Closing twice is harmless.

        Raises:
            BarberError: the file cannot be flushed or renamed.
            ValueError: a tensor was never written; the partial file is removed.
        """
        if self._file < 0:
            return
        if self._unwritten:
            missing = min(self._unwritten)
            self.abort()
            raise ValueError(f"{self.path}: {len(self._unwritten)} tensors were not written, such as {missing}")
        try:
            with self._reporting_os_errors():
                replaced = not self._is_in_place()
                descriptor, self._file = self._file, -1
                os.close(descriptor)
                if replaced:
                    raise FileExistsError(errno.EEXIST, "another file has taken its place while it was written")
                os.replace(self._partial, self.path)
        except BarberError:
            self.abort()
            raise

    def abort(self) -> None:
        """Discard the file and remove its partial content; an existing file at `path` is left unchanged."""
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)
        with contextlib.suppress(OSError):
            if self._is_in_place():
                self._partial.unlink()

    def _is_in_place(self) -> bool:
        """Whether the partial file is still the one that was opened, and not another of its name."""
        return os.path.samestat(self._stat, os.lstat(self._partial))

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        elif self._file >= 0:
            self.abort()

    @contextlib.contextmanager
    def _reporting_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = _ADVICE.get(error.errno, "choose another place")
            raise BarberError(f"cannot write {self.path}: {error.strerror or error}; {advice}") from error


def _layout(
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Compute the header's bytes, each tensor's offset in the file, and the size of the whole file."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r} is not a string")
    if "__metadata__" in specs:
        raise ValueError("__metadata__ is reserved and cannot name a tensor")
    entries: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    # Widest dtypes first, as in the safetensors package; the header is a multiple of 8, so every tensor is aligned.
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name}: safetensors has no dtype {dtype.str} ({dtype})")
        starts[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": [int(n) for n in shape],
            "data_offsets": [int(starts[name]), int(end)],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def _reserve(file: int, size: int) -> None:
    """Reserve the file's whole size where possible, so that a full disk is reported before hours of work, not after."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in _NO_RESERVATION:
            raise


def _write_all(file: int, content: bytes | memoryview, offset: int) -> None:
    """Call `os.pwrite` until everything is written: one call may write less, and on Linux at most 2 GiB."""
    content = memoryview(content)
    while content:
        written = os.pwrite(file, content, offset)
        content = content[written:]
        offset += written
