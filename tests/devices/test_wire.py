"""What processes send each other: exact, plain, and checked when it arrives."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barber_jax.devices import wire

RECORD = {"block": 3, "sub_blocks": [{"name": "mlp", "loss": 0.1 + 0.2, "outliers": None}], "ok": True, "text": "ü🙂"}


def test_values_and_arrays_arrive_as_they_were():
    rng = np.random.default_rng(0)
    arrays = {
        "mask/a": rng.integers(0, 256, 7, np.uint8),
        "weight/b": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "weight/c": np.asfortranarray(rng.normal(size=(4, 2)).astype(np.float32)),
        "half": np.array([np.inf, -0.0, np.nan], np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int32),
    }
    value, got = wire.decode(wire.encode(RECORD, arrays))
    assert value == RECORD and list(got) == list(arrays)
    for name, array in arrays.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes() and got[name].flags.writeable
    for plain in (0, 0.1, [0.1, 1e-300], None):
        assert wire.decode(wire.encode(plain)) == (plain, {})


def test_nothing_else_is_sent():
    for value in (object(), np.float32(1), {1, 2}, b"x"):
        with pytest.raises(TypeError):
            wire.encode(value)
    with pytest.raises(ValueError, match="dtype object, which is not sent"):
        wire.encode(None, {"a": np.array([object()])})


def message(**parts):
    text = json.dumps({"value": 1, "arrays": [], **parts}).encode()
    return len(text).to_bytes(wire.HEADER, "big") + text


SOUND = wire.encode(RECORD, {"a": np.arange(6, dtype=np.int32).reshape(2, 3)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        SOUND[:-1],
        SOUND + b"\0",
        b"\xff" * 40,
        (2**60).to_bytes(8, "big") + SOUND[8:],
        message(extra=1),
        message(arrays={}),
        message(arrays=[["a", "object", [1]]]),
        message(arrays=[["a", "float64", [1]]]),
        message(arrays=[["a", "uint8", [-1]]]),
        message(arrays=[["a", "uint8", [2**62]]]),
        message(arrays=[["a", "uint8", [True]]]) + b"x",
        message(arrays=[["a", "uint8", 1]]),
        message(arrays=[[1, "uint8", [1]]]) + b"x",
        message(arrays=[["a", "uint8"]]),
        message(arrays=[["a", "uint8", [1] * 9]]) + b"x",
        message(arrays=[["a", "uint8", [0, 10**4000]]]),
        # The product of all sizes would take hours.
        message(arrays=[["a", "uint8", [10**900] * 20_000]]),
    ],
)
def test_what_is_not_such_a_message_is_refused(content):
    with pytest.raises(ValueError):
        wire.decode(content)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_a_changed_byte_is_at_worst_another_value(at, byte):
    changed = bytearray(SOUND)
    changed[at] = byte
    try:
        value, arrays = wire.decode(bytes(changed))
    except ValueError:
        return
    json.dumps(value)
    assert all(array.nbytes <= len(SOUND) for array in arrays.values())
