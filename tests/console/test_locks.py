"""One lock per output folder, whichever way it is spelled, released when its process ends."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from barber_jax.console import locks
from barber_jax.console.errors import BarberError
from barber_jax.console.locks import FolderIdentity, output_lock

HOLDER = """
import sys, time
from barber_jax.console.locks import output_lock
with output_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_says_who_holds_it(holder, tmp_path):
    with pytest.raises(BarberError) as raised, output_lock(tmp_path / "out"):
        pass
    who = rf"{tmp_path}/out is being written by process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d [\d:+-]+: \S*python"
    assert re.match(who, str(raised.value)) and "choose another folder" in str(raised.value)


def test_the_system_releases_the_lock_of_a_killed_process(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert os.listdir(tmp_path) == [".out.lock"]
    with output_lock(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / ".out.lock").read_text()
    assert os.listdir(tmp_path) == []


def test_every_spelling_is_the_same_lock(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for one in ("out", "link", tmp_path / "link"):
        with output_lock(one):
            for other in (tmp_path / "out", "out", f"{tmp_path}/out/", "link/", "out/../out", "./link", "~/out"):
                with pytest.raises(BarberError, match=f"process {os.getpid()} on"), output_lock(other):
                    pass
            with output_lock("out2"), output_lock("out/inside"):
                pass
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_parents_are_made_and_removed_if_they_stay_empty(tmp_path):
    with output_lock(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "kept").touch()
    assert os.listdir(tmp_path / "a") == ["kept"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pid": 1}', b"\xff\x00", b"[" * 5000])
def test_a_strange_lock_file_is_told_in_one_line(content, tmp_path):
    with output_lock(tmp_path / "out"):
        (tmp_path / ".out.lock").write_bytes(content)
        with (
            pytest.raises(BarberError, match=r"another command \(lock file .*\.out\.lock\)"),
            output_lock(tmp_path / "out"),
        ):
            pass


def test_what_a_lock_file_says_cannot_control_the_terminal(tmp_path):
    with output_lock(tmp_path / "out"):
        (tmp_path / ".out.lock").write_text('{"pid": 1, "host": "\\u001b[2J", "command": "a\\nb", "since": "now"}')
        with (
            pytest.raises(BarberError, match=re.escape("process 1 on ?[2J since now: a?b; wait")),
            output_lock(tmp_path / "out"),
        ):
            pass


def test_a_lock_file_that_is_another_ones_by_now_is_left(tmp_path):
    with output_lock(tmp_path / "out"):
        (tmp_path / ".out.lock").rename(tmp_path / "moved")
        (tmp_path / ".out.lock").write_text("of another process")
    assert (tmp_path / ".out.lock").read_text() == "of another process"


def refuse(monkeypatch, folder, number):
    """Files cannot be locked in this folder, as if it were on a read-only file system."""
    lock = locks.FileLock

    def refusing(path, **options):
        if path.parent == folder:
            raise OSError(number, os.strerror(number), str(path))
        return lock(path, **options)

    monkeypatch.setattr(locks, "FileLock", refusing)


def test_where_the_parent_is_read_only_the_lock_is_in_the_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    refuse(monkeypatch, tmp_path, errno.EROFS)
    with output_lock(tmp_path / "out"):
        assert os.listdir(tmp_path / "out") == [".lock"]
        with pytest.raises(BarberError, match=f"process {os.getpid()} on"), output_lock(tmp_path / "out"):
            pass
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(BarberError, match=r"cannot write .*new: Read-only file system"), output_lock(tmp_path / "new"):
        pass


def test_another_users_lock_file_is_named(tmp_path, monkeypatch):
    refuse(monkeypatch, tmp_path, errno.EACCES)
    (tmp_path / ".out.lock").touch()
    with pytest.raises(BarberError, match=r"lock .*\.out\.lock belongs to another user"), output_lock(tmp_path / "out"):
        pass


def test_a_folder_made_again_under_the_same_name_is_another(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    identity = FolderIdentity(folder)
    assert identity.is_at(folder)
    for _ in range(20):  # File systems give a free number to the next folder.
        shutil.rmtree(folder)
        assert not identity.is_at(folder)
        folder.mkdir()
        assert not identity.is_at(folder)
    identity.close()
    identity.close()
