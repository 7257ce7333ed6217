"""Notes are one line each, and never a reason to stop."""

import io

import pytest

from barber_jax.console import notes


@pytest.fixture(autouse=True)
def voice(monkeypatch):
    monkeypatch.setattr(notes, "_silent", False)


def test_one_line(capsys):
    notes.note("a folder\nof two lines: both are used")
    assert capsys.readouterr().err == "note: a folder of two lines: both are used\n"


def test_silenced(capsys):
    notes.silence()
    notes.note("anything")
    assert capsys.readouterr().err == ""


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stderr", [Full(), None])
def test_stderr_that_cannot_be_written(stderr, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", stderr)
    notes.note("anything")
    assert capsys.readouterr().out == ""
