"""The streaming writer: what it writes must be what the safetensors package reads, and nothing half-written stays."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from checkpoints import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.safetensors_writer import DTYPE_NAMES, SafetensorsWriter

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES),
    max_size=6,
)


def random_array(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    return rng.integers(0, 100, shape).astype(dtype)


def load_torch_file(path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    return load_file(path)


def raw(tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=60, deadline=None)
@given(specs=SPECS, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3), seed=st.integers(0))
def test_round_trip_in_any_order(tmp_path_factory, specs, metadata, seed):
    rng = np.random.default_rng(seed)
    arrays = {name: np.asarray(random_array(rng, *spec)) for name, spec in specs.items()}
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    with SafetensorsWriter(path, specs, metadata) as writer:
        names = list(specs)
        # Indices are permuted: NumPy strings would drop a name's trailing NUL.
        for name in (names[i] for i in rng.permutation(len(names))):
            writer.write(str(name), arrays[str(name)])
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(specs)
        assert (file.metadata() or {}) == metadata
        for name, (dtype, shape) in specs.items():
            assert file.get_slice(name).get_dtype() == DTYPE_NAMES[dtype]
            assert file.get_slice(name).get_shape() == list(shape)
    tensors = load_torch_file(path)
    for name, array in arrays.items():
        assert tuple(tensors[name].shape) == array.shape
        assert raw(tensors[name]) == array.tobytes()
    assert os.listdir(path.parent) == ["t.safetensors"]


def test_every_dtype_reads_back_with_its_values(tmp_path):
    path = tmp_path / "t.safetensors"
    values = np.array([[0, 1, 0.5], [2, 3, 4]])
    specs = {DTYPE_NAMES[dtype]: (dtype, values.shape) for dtype in DTYPE_NAMES}
    with SafetensorsWriter(path, specs, {}) as writer:
        for name, (dtype, _) in specs.items():
            writer.write(name, values.astype(dtype))
    tensors = load_torch_file(path)
    for name, (dtype, _) in specs.items():
        assert np.array_equal(tensors[name].to(torch.float64).numpy(), values.astype(dtype).astype(np.float64)), name


def test_layout_is_aligned_and_contiguous(tmp_path):
    path = tmp_path / "t.safetensors"
    specs = {"a": (np.uint8, (3,)), "b": (np.float64, (2,)), "c": (np.float16, (5,)), "d": (np.float32, ())}
    with SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for name, (dtype, shape) in specs.items():
            writer.write(name, np.zeros(shape, dtype))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert spans[-1][1] == len(content) - 8 - length
    for name, (dtype, _) in specs.items():
        assert header[name]["data_offsets"][0] % np.dtype(dtype).itemsize == 0


def test_non_contiguous_arrays_are_written_in_c_order(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    path = tmp_path / "t.safetensors"
    with SafetensorsWriter(path, {"t": (np.int32, (6, 4)), "s": (np.int32, (2, 3))}, {}) as writer:
        writer.write("t", array.T)
        writer.write("s", array[::2, ::2])
    tensors = load_file(path)
    assert np.array_equal(tensors["t"], array.T)
    assert np.array_equal(tensors["s"], array[::2, ::2])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: whole(file, data[:7], offset))
    array = np.arange(100, dtype=np.float32)
    with SafetensorsWriter(tmp_path / "t", {"a": (np.float32, (100,))}, {}) as writer:
        writer.write("a", array)
    assert np.array_equal(load_file(tmp_path / "t")["a"], array)


def test_contiguous_arrays_are_not_copied(tmp_path, monkeypatch):
    array = np.arange(100, dtype=np.float32)
    array.flags.writeable = False
    whole, shared = os.pwrite, []

    def watching(file, data, offset):
        shared.append(np.shares_memory(np.frombuffer(data, np.uint8), array))
        return whole(file, data, offset)

    with SafetensorsWriter(tmp_path / "t", {"a": (np.float32, (100,))}, {}) as writer:
        monkeypatch.setattr(os, "pwrite", watching)
        writer.write("a", array)
    assert shared == [True]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("b", np.zeros((2, 3), np.float32)),
        ("a", np.zeros((3, 2), np.float32)),
        ("a", np.zeros((2, 3), np.float64)),
        ("a", np.zeros((2, 3), ">f4")),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path, name, array):
    with SafetensorsWriter(tmp_path / "t", {"a": (np.float32, (2, 3))}, {}) as writer:
        with pytest.raises(ValueError):
            writer.write(name, array)
        writer.write("a", np.ones((2, 3), np.float32))
        with pytest.raises(ValueError, match="already"):
            writer.write("a", np.zeros((2, 3), np.float32))
    assert load_file(tmp_path / "t")["a"].all()
    with pytest.raises(ValueError, match="closed"):
        writer.write("a", np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": (np.complex64, (2,))}, {}),
        ({"a": (">f4", (2,))}, {}),
        ({"__metadata__": (np.uint8, (2,))}, {}),
        ({}, {"version": 1}),
    ],
)
def test_unwritable_headers_are_refused_and_leave_nothing(tmp_path, tensors, metadata):
    with pytest.raises(ValueError):
        SafetensorsWriter(tmp_path / "t", tensors, metadata)
    assert not os.listdir(tmp_path)


def test_a_missing_tensor_shows_at_close(tmp_path):
    writer = SafetensorsWriter(tmp_path / "t", {"a": (np.uint8, (1,)), "b": (np.uint8, (1,))}, {})
    writer.write("a", np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="such as b"):
        writer.close()
    assert not os.listdir(tmp_path)


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "t"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, {"a": (np.uint8, (9,))}, {}):
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["t"]


def test_a_missing_folder_and_a_folder_in_the_way(tmp_path):
    with pytest.raises(BarberError, match=r"cannot write .*none/t: No such file.*create the folder"):
        SafetensorsWriter(tmp_path / "none" / "t", {}, {})
    with pytest.raises(BarberError, match="Is a directory"):
        SafetensorsWriter(tmp_path, {}, {})


def test_a_full_disk_while_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(BarberError, match=r"cannot write .*/t: No space left on device; free some space"),
        SafetensorsWriter(tmp_path / "t", {"a": (np.uint8, (9,))}, {}) as writer,
    ):
        monkeypatch.setattr(os, "pwrite", full)
        writer.write("a", np.zeros(9, np.uint8))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("unsupported", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve_space(tmp_path, monkeypatch, unsupported):
    def refuse(*_):
        raise OSError(unsupported, os.strerror(unsupported))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with SafetensorsWriter(tmp_path / "t", {"a": (np.uint8, (9,))}, {}) as writer:
        writer.write("a", np.ones(9, np.uint8))
    assert load_file(tmp_path / "t")["a"].all()


LIMITED = """
    import os, resource, sys
    import numpy as np
    from barber_jax.convert.safetensors_writer import SafetensorsWriter
    from barber_jax.console.errors import exit_with_one_line

    if sys.argv[2] == "late":
        del os.posix_fallocate
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    def main():
        with SafetensorsWriter(sys.argv[1], {"a": (np.uint8, (100000,))}, {}) as writer:
            print("opened", flush=True)
            writer.write("a", np.zeros(100000, np.uint8))

    exit_with_one_line(main)
"""


@pytest.mark.parametrize(("when", "printed"), [("early", ""), ("late", "opened\n")])
def test_the_systems_own_limit_is_one_line_and_leaves_nothing(tmp_path, when, printed):
    path = tmp_path / "t.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), path, when], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == printed
    assert done.stderr.startswith(f"error: cannot write {path}: File too large; raise the file-size limit")
    assert done.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)
