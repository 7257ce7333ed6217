"""Gradients of the dense model on disk: what was written comes back, and damage is found."""

import numpy as np
import pytest

from barber_jax.console.errors import BarberError
from barber_jax.run.gradient_file import CHECKSUMS, WEIGHTS, GradientFile

SHAPES = {"self_attn.q_proj.kernel": (8, 6), "mlp.up_proj.kernel": (6, 4)}


def arrays(index):
    rng = np.random.default_rng(index)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def file(tmp_path):
    file = GradientFile(tmp_path / WEIGHTS, 3, SHAPES)
    file.write((index, arrays(index)) for index in (2, 1, 0))
    return file


def test_what_was_written_comes_back(file):
    assert file.is_whole()
    for index in range(3):
        found = file.read(index)
        assert list(found) == list(SHAPES)
        assert all((found[name] == array).all() for name, array in arrays(index).items())
    assert not GradientFile(file.path, 4, SHAPES).is_whole()
    assert not GradientFile(file.path, 3, {**SHAPES, "mlp.up_proj.kernel": (4, 6)}).is_whole()
    assert not GradientFile(file.path.with_name("none"), 3, SHAPES).is_whole()


def test_damage_is_found(file):
    content = file.path.read_bytes()
    places = (4, content.index(CHECKSUMS.encode()) + 2, len(content) // 2, len(content) - 3)
    for place in places:
        file.path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        assert not file.is_whole(), place
    file.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BarberError, match=f"{WEIGHTS}: damaged .*; --resume computes it again"):
        file.read(0)


def test_an_unfinished_file_has_no_name(tmp_path):
    file = GradientFile(tmp_path / WEIGHTS, 3, SHAPES)

    def stopped():
        yield 2, arrays(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.write(stopped())
    assert not list(tmp_path.iterdir())
