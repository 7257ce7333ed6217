"""Files and folders that a command writes are seen whole or not at all."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from barber_jax.console import outputs
from barber_jax.console.errors import BarberError
from barber_jax.console.locks import output_lock
from barber_jax.console.outputs import check_name, new_folder, output_file, write_whole

KINDS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


def test_a_reader_never_sees_a_part(tmp_path):
    path, stop, seen = tmp_path / "a.json", threading.Event(), set()
    path.write_text("x" * 10**6)

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(100):
        write_whole(path, "xy"[index % 2] * 10**6)
    stop.set()
    reader.join()
    assert seen <= {"x" * 10**6, "y" * 10**6}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("raised", KINDS, ids=lambda raised: type(raised).__name__)
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_what_was_there_stays_if_writing_fails(step, raised, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise raised

    monkeypatch.setattr(*((Path, step) if step == "write_bytes" else (outputs.os, step)), fail)
    with pytest.raises(BarberError if isinstance(raised, OSError) else KeyboardInterrupt):
        write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    write_whole(path, "one")
    (tmp_path / "touched").touch()
    assert path.stat().st_mode == (tmp_path / "touched").stat().st_mode
    path.chmod(0o604)
    link.symlink_to("a.json")
    write_whole(link, "ä")
    assert link.is_symlink() and path.read_text(encoding="utf-8") == "ä"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


@pytest.mark.parametrize("to", ["| cat", "> file; cat file"])
def test_a_stream_is_written_as_it_is(to, tmp_path):
    code = """
from pathlib import Path
from barber_jax.console.outputs import output_file, write_whole
with output_file(Path("/dev/stdout")) as file:
    write_whole(file, "one\\n")
print("two")
"""
    shell = f'"$0" -c "$1" {to}'
    process = subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=tmp_path, capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("one\ntwo\n", "")
    write_whole(Path(os.devnull), "lost")


def test_a_file_in_a_read_only_folder_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    allowed = os.access
    monkeypatch.setattr(outputs.os, "access", lambda place, mode: place != tmp_path and allowed(place, mode))
    with output_file(path) as file:
        assert os.listdir(tmp_path) == ["a.json"], "a lock file cannot be written there"
        write_whole(file, "new")
    assert path.read_text() == "new"
    with (
        pytest.raises(BarberError, match=r"--json .*new\.json cannot be written; name a file"),
        output_file(tmp_path / "new.json"),
    ):
        pass


def test_two_commands_for_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with output_file(Path("~/a.json")) as file:
        assert file == tmp_path / "a.json"
        with pytest.raises(BarberError, match="choose another file"), output_file(file):
            pass
        with output_file(tmp_path / "b.json"):
            pass
    with output_file(file):
        pass
    with output_file(None) as nothing:
        assert nothing is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [".", "missing/a.json", "file/a.json"])
def test_no_place_for_a_file(path, tmp_path):
    (tmp_path / "file").touch()
    said = r"^--to .* is a folder or its folder does not exist"
    with pytest.raises(BarberError, match=said), output_file(tmp_path / path, "--to"):
        pass


@pytest.mark.parametrize("empty", [False, True])
def test_a_new_folder(empty, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "out.partial" / "left by a killed command").mkdir(parents=True)
    if empty:
        out.mkdir()
    with output_lock(out), new_folder(out) as folder:
        (folder / "a").touch()
        assert out.exists() == empty
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["a"]


def test_a_mount_point_is_no_new_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(BarberError, match=r"out is a mount point"), new_folder(tmp_path / "out"):
        pytest.fail("the work has begun")
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_left_of_a_folder_that_fails(tmp_path):
    (tmp_path / "full" / "a").mkdir(parents=True)
    for name, raised in (("out", KeyboardInterrupt()), ("out", ValueError()), ("full", None)):
        with pytest.raises(type(raised) if raised else BarberError), new_folder(tmp_path / name) as folder:
            (folder / "b").touch()
            if raised:
                raise raised
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["a"]


def test_a_folder_of_somebody_else_is_not_published(tmp_path):
    with pytest.raises(BarberError, match="removed or replaced"), new_folder(tmp_path / "out") as folder:
        folder.rename(tmp_path / "elsewhere")
        folder.mkdir()
    assert not (tmp_path / "out").exists() and folder.exists()


def test_no_folder_is_deleted_that_only_has_the_name_of_an_unfinished_one(tmp_path):
    """The result of another command, or what this one reads."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    with pytest.raises(BarberError, match=r"--out .*out\.partial: a name that ends in \.partial"), new_folder(partial):
        pass
    (tmp_path / "link").symlink_to(partial)
    check_name(out, [tmp_path, tmp_path / "other.partial"])
    for given in (partial, partial / "model.gguf", tmp_path / "link"):
        with pytest.raises(BarberError, match=r"is in .*out\.partial, .* would be deleted; choose another --out"):
            check_name(out, [given])
