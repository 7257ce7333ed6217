"""How a command ends: one line on stderr and the exit status, whatever is thrown."""

import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from barber_jax.console import causes
from barber_jax.console.errors import MAX_LINE, MAX_WORD, BarberError, exit_with_one_line, one_line
from barber_jax.console.files import expand
from barber_jax.console.progress import Progress, Stopwatch
from barber_jax.console.quiet import held_output, silenced


class PanicException(BaseException):
    """As pyo3 raises it for a panic in Rust: not an Exception."""


def ending(capsys, raised):
    """(exit status, the only line on stderr) of a command that raises."""

    def main():
        raise raised

    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(main)
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and not printed.out
    return stop.value.code, line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (BarberError("a.json: damaged;\n fetch it again"), "a.json: damaged; fetch it again"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), "a.json: No such file; fix this path"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (MemoryError(), "out of memory; raise the limit"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB); raise"),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc); raise"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes.\nmore"), "out of memory (RESOURCE_EXHAUSTED: 9 bytes.)"),
        (RuntimeError("can't start new thread"), "starts no more threads"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "Too many open files (a); raise the limit (ulimit -n)"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in []"), "set TMPDIR to one"),
        (PanicException("no entry found for key"), "tokenizers library failed (no entry found for key)"),
    ],
    ids=lambda value: getattr(type(value), "__name__", None),
)  # fmt: skip
def test_a_cause_outside_the_program_is_status_2(capsys, raised, says):
    status, line = ending(capsys, raised)
    assert (status, line[: len(says)]) == (2, says) or (status == 2 and says in line)


def test_a_warning_that_the_user_makes_an_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    status, line = ending(capsys, DeprecationWarning("old\nsecond line"))
    assert status == 2 and "by PYTHONWARNINGS or python -W (DeprecationWarning: old); unset it" in line


def test_a_current_folder_that_was_deleted(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as error:
        Path("a").absolute()
    assert ending(capsys, error.value) == (2, "the current folder was deleted; change to one that exists")


def test_lack_of_device_memory_names_the_stage_and_what_helps(capsys):
    with Progress(silent=True) as progress, progress.phase("pruning", 5) as phase:
        stage = Stopwatch(phase, 3).stage("mlp gradient")
        with pytest.raises(RuntimeError) as error, stage:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    status, line = ending(capsys, error.value)
    assert status == 2
    assert line.startswith("out of memory at block 3, mlp gradient (RESOURCE_EXHAUSTED: Out of memory")
    assert all(option in line for option in ("--batch", "--offload-activations", "--mesh"))


@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"])
def test_a_setting_of_jax_that_it_does_not_know(name, tmp_path):
    """The messages are JAX's own, so this fails when JAX words them anew."""
    environment = os.environ | {name: "perhaps"}
    line = [sys.executable, "-m", "barber_jax.report", tmp_path]
    process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert process.stderr.endswith(f"; correct the environment variable {name}, or unset it\n")


def test_a_platform_that_is_not_there(capsys, monkeypatch):
    """The message is JAX's own, so this fails when JAX words it anew."""
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(RuntimeError) as error:
        jax.devices("abacus")
    status, line = ending(capsys, error.value)
    assert status == 2 and line.startswith("JAX_PLATFORMS=abacus: ") and line.endswith("such as cpu")


@pytest.mark.parametrize("raised", [ValueError("odd\nsecond line"), KeyError("x"), AssertionError(), PanicException])
def test_anything_else_is_status_1_and_a_log_file(capsys, monkeypatch, tmp_path, raised):
    monkeypatch.setattr(causes.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(causes, "is_panic", lambda error: False)
    monkeypatch.setattr(sys, "argv", ["prune", "--out", "a b"])
    status, line = ending(capsys, raised)
    (log,) = tmp_path.iterdir()
    assert status == 1
    name = raised.__name__ if isinstance(raised, type) else type(raised).__name__
    assert line.startswith(f"unexpected {name}") and line.endswith(f"in {log}")
    assert "second line" not in line
    written = log.read_text()
    assert "Traceback (most recent call last)" in written and "in main\n" in written and "prune --out 'a b'" in written
    assert log.stat().st_mode & 0o077 == 0, "others may read it"


def test_without_a_place_for_the_log_there_is_still_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(causes.tempfile, "tempdir", str(tmp_path / "gone"))
    status, line = ending(capsys, ValueError("odd"))
    assert status == 1 and line.startswith("unexpected ValueError: odd; its traceback could not be saved")


def test_ctrl_c_and_exit_pass(capsys):
    assert ending(capsys, KeyboardInterrupt()) == (130, "interrupted")
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: sys.exit(7))
    assert stop.value.code == 7 and not capsys.readouterr().err


def test_warnings_are_held_until_success(capsys, monkeypatch):
    # As in a plain interpreter; pytest shows warnings in its own way.
    monkeypatch.setattr(sys, "warnoptions", [])

    def main(fails):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for _ in range(3):
                warnings.warn("overflow\nin multiply", RuntimeWarning, stacklevel=1)
        if fails:
            raise BarberError("no")

    with pytest.raises(SystemExit):
        exit_with_one_line(lambda: main(True))
    assert capsys.readouterr().err == "error: no\n"
    exit_with_one_line(lambda: main(False))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: RuntimeWarning: overflow in multiply (")


def test_long_messages_are_cut_in_the_middle():
    message = f"a.json: {'x' * 100_000} is not a number; " + "one two " * 10_000 + "fetch it again"
    line = str(BarberError(message))
    assert len(line) <= MAX_LINE and line.startswith("a.json: xxx") and line.endswith("fetch it again")
    assert max(map(len, line.split())) <= MAX_WORD
    for text in ("short", "w" * MAX_WORD, "äöü 漢字 🙂"):
        assert one_line(text) == text
    assert one_line("a\x1b[31m\tb\n\x00\udce9") == "a\\x1b[31m b \\x00\\udce9"
    assert one_line("") == ""


def test_native_code_prints_nothing_beside_an_error(capfd):
    with pytest.raises(ValueError), held_output():
        os.write(2, b"thread panicked\n")
        os.write(1, b"unknown option\n")
        raise ValueError
    assert capfd.readouterr() == ("", "")
    print("a result")
    with held_output():
        os.write(2, b"a warning\n")
        os.write(1, b"a note\n")
    print("another")
    # What a library says is no result.
    assert capfd.readouterr() == ("a result\nanother\n", "a warning\na note\n")


def test_a_silenced_logger_speaks_again(caplog):
    import logging

    with silenced("some.library"):
        logging.getLogger("some.library").error("one")
    logging.getLogger("some.library").error("two")
    assert [record.message for record in caplog.records] == ["two"]


def test_homes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand("~/a") == Path("/somewhere/a") and expand("a/~b") == Path("a/~b") and expand("") == Path("")
    with pytest.raises(BarberError, match=re.escape("~nosuchuser/a: no home folder is known for ~nosuchuser; write")):
        expand("~nosuchuser/a")
    # A container's user may have no home at all.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(BarberError, match="no home folder is known for ~"):
        expand("~/a")
    (tmp_path / "~odd").mkdir()
    assert expand("~odd") == Path("~odd")


def test_a_cache_without_a_home_is_left_out(monkeypatch):
    from barber_jax.devices.settings import set_compilation_cache

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = jax.config.jax_compilation_cache_dir
    try:
        for given in (None, "/dev/null/x"):
            if given:
                # JAX has read it already.
                monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
                jax.config.update("jax_compilation_cache_dir", given)
            set_compilation_cache(None)
            assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with pytest.raises(BarberError, match="--compilation-cache ~/x: cannot be written"):
        set_compilation_cache("~/x")
