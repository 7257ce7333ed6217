"""Plain encoding of what processes send each other: JSON and raw arrays, checked when it arrives.

Never pickle: who can reach the connection could run code.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from barber_jax.console import documents

DTYPES = {
    np.dtype(kind).name: np.dtype(kind) for kind in (np.uint8, np.int32, np.float16, np.float32, ml_dtypes.bfloat16)
}
"""Name -> dtype of the arrays that are sent."""
HEADER = 8
"""Bytes at the beginning that hold the length of the JSON text."""
MAX_AXES, MAX_SIZE = 8, 2**48
"""Axes of an array, and its size along each, at most: the product of thousands of long numbers would take hours."""


def encode(value: Any, arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """Encode a JSON-serialisable value and arrays by name.

    Raises:
        TypeError: the value is not JSON-serialisable.
        ValueError: an array is of a dtype that is not in `DTYPES`.
    """
    arrays = arrays or {}
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"array {name} has dtype {array.dtype}, which is not sent")
    specs = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({"value": value, "arrays": specs}).encode()
    return b"".join([len(text).to_bytes(HEADER, "big"), text, *(_bytes(array) for array in arrays.values())])


def _bytes(array: np.ndarray) -> bytes:
    return array.astype(DTYPES[array.dtype.name], copy=False).tobytes()


def decode(content: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Decode what `encode` made: the value, in which tuples have become lists, and the arrays in their order.

    Raises:
        ValueError: the content is of another form, or longer or shorter than it says.
    """
    length = int.from_bytes(content[:HEADER], "big")
    if len(content) < HEADER + length:
        raise ValueError(f"{len(content)} bytes, but the text alone has {length}")
    match documents.parse(content[HEADER : HEADER + length].decode("utf-8")):
        case {"value": value, "arrays": list(specs), **others} if not others:
            arrays, at = {}, HEADER + length
        case _:
            raise ValueError("not a message of a value and arrays")
    for spec in specs:
        name, dtype, shape = _checked(spec)
        count = math.prod(shape)
        if at + count * dtype.itemsize > len(content):
            raise ValueError(f"the message ends within array {name}")
        arrays[name] = np.frombuffer(content, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    if at != len(content):
        raise ValueError(f"{len(content) - at} bytes more than the message says")
    return value, arrays


def _checked(spec: Any) -> tuple[str, np.dtype, tuple[int, ...]]:
    """Name, dtype and shape of an array from its entry in a message."""
    match spec:
        case [str(name), str(dtype), list(shape)] if dtype in DTYPES and len(shape) <= MAX_AXES:
            if all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape):
                return name, DTYPES[dtype], tuple(shape)
    raise ValueError("an array without name, known dtype and shape")
