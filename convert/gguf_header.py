"""Parses the header of a GGUF file, its metadata and the location of each tensor, checking every count.

Types, block sizes and decoders come from the `gguf` package. Its GGUFReader is not used: it trusts the counts in the
file, so one damaged byte can make it loop practically forever, and it holds a NumPy view for every token of the
vocabulary.
"""

import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
# Bytes of one string or array: more than any vocabulary or chat template needs, so a larger count means damage.
MAX_VALUE_BYTES = 1 << 24
# Bytes of a whole header: vocabularies of a quarter of a million tokens take a tenth. A file of zeros of some gigabytes
# could otherwise stand for as many empty strings as memory holds.
MAX_HEADER_BYTES = 1 << 27

SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class StoredTensor(NamedTuple):
    """Type and location of a tensor in the file.

    Attributes:
        kind: quantisation type.
        shape: in NumPy's order, outermost dimension first.
        offset: position of the first byte from the start of the file.
        size: bytes that the tensor takes in the file.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


class Header(NamedTuple):
    """Metadata by key (scalars, strings, lists of strings, 1-d arrays), and tensors by GGUF name."""

    fields: dict
    tensors: dict[str, StoredTensor]


class _Damaged(Exception):
    """The file's content is invalid; `read_header` adds the file's name to the message."""


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file, without reading tensor data.

    Raises:
        BarberError: the file cannot be read, is not GGUF, is damaged or cut short, or holds a tensor of a type that
            the `gguf` package cannot decode.
    """
    check_fetched(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            return _parse(_Cursor(handle), size)
    except OSError as error:
        raise BarberError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except _Damaged as error:
        raise BarberError(f"{path}: {error}; download or convert the file again") from None


class _Cursor:
    """Reads the header's values in sequence."""

    def __init__(self, handle: BinaryIO):
        self._handle, self._left = handle, MAX_HEADER_BYTES

    def position(self) -> int:
        return self._handle.tell()

    def take(self, count: int) -> bytes:
        data = self._handle.read(count) if count <= min(MAX_VALUE_BYTES, self._left) else b""
        self._left -= len(data)
        if len(data) != count:
            raise _Damaged("the header is damaged or the file is cut short")
        return data

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def number(self, dtype: str) -> int | float | bool:
        return self.numbers(dtype, 1)[0].item()

    def text(self) -> str:
        try:
            return self.take(self.number("<u8")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("the header is damaged: a string in it is not UTF-8") from None

    def name(self) -> str:
        name = self.text()
        if not name.isprintable():
            raise _Damaged(f"the header is damaged: {name!r} is not a valid name")
        return name

    def value(self):
        kind = self._value_type()
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(SCALARS[kind])
        kind, count = self._value_type(), self.number("<u8")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise _Damaged("the header is damaged: it holds an array of arrays")
        return self.numbers(SCALARS[kind], count)

    def _value_type(self) -> GGUFValueType:
        kind = self.number("<u4")
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise _Damaged(f"the header is damaged: there is no value type {kind}") from None


def _parse(cursor: _Cursor, size: int) -> Header:
    if size < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
        raise _Damaged("not a GGUF file")
    version = cursor.number("<u4")
    if version not in VERSIONS:
        raise _Damaged(f"GGUF version {version} is not supported (only little-endian {VERSIONS})")
    tensor_count, field_count = cursor.numbers("<u8", 2).tolist()
    fields = {}
    for _ in range(field_count):
        _add(fields, cursor.name(), cursor.value())
    entries = {}
    for _ in range(tensor_count):
        _add(entries, cursor.name(), _tensor_entry(cursor))
    return Header(fields, _locate_tensors(entries, _alignment(fields), cursor.position(), size))


def _add(table: dict, key: str, value) -> None:
    if key in table:
        raise _Damaged(f"the header is damaged: {key!r} occurs twice")
    table[key] = value


def _tensor_entry(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    """Read a tensor's shape in NumPy's order, type number and offset from the start of the data section."""
    dimensions = cursor.number("<u4")
    if dimensions > MAX_DIMENSIONS:
        raise _Damaged(f"the header is damaged: a tensor with {dimensions} dimensions")
    return tuple(cursor.numbers("<u8", dimensions).tolist()[::-1]), cursor.number("<u4"), cursor.number("<u8")


def _alignment(fields: dict) -> int:
    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged("the header is damaged: general.alignment is not a power of two")
    return alignment


def _locate_tensors(entries: dict, alignment: int, header_end: int, size: int) -> dict[str, StoredTensor]:
    """Compute each tensor's location. Tensors must follow one another, so that none reads another's bytes."""
    start = _padded(header_end, alignment)
    tensors, expected = {}, 0
    for name, (shape, number, offset) in entries.items():
        kind = _decodable_type(name, number)
        length = _stored_size(name, shape, kind)
        if offset != expected:
            raise _Damaged(f"the header is damaged: tensor {name} is not where the previous one ends")
        if start + offset + length > size:
            raise _Damaged(f"the file is cut short: tensor {name} ends past the end of the file")
        tensors[name] = StoredTensor(kind, shape, start + offset, length)
        expected = _padded(offset + length, alignment)
    return tensors


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _decodable_type(name: str, number: int) -> GGMLQuantizationType:
    """The tensor's type, if the `gguf` package can decode it.

    The package has no list of the types that it decodes, so this decodes one block of zeros.
    """
    try:
        kind = GGMLQuantizationType(number)
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except ValueError:
        raise _Damaged(f"tensor {name} has the unknown type {number}") from None
    except NotImplementedError:
        raise _Damaged(f"tensor {name} has type {kind.name}, which the gguf package cannot decode") from None
    return kind


def _stored_size(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise _Damaged(f"the header is damaged: tensor {name} of shape {shape} does not fit {kind.name} blocks")
    return math.prod(shape) // block * block_bytes
