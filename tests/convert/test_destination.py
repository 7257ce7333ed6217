"""Where a result can be published is tried before the work; what is published is what the run wrote."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from barber_jax.console.errors import BarberError
from barber_jax.console.locks import output_lock
from barber_jax.convert.export import FolderWriter, claimed
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.safetensors_writer import SafetensorsWriter


@pytest.fixture
def out(tmp_path):
    """The result of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "run.json").write_text("old")
    return folder


def untouched(out):
    assert os.listdir(out.parent) == ["out"] and os.listdir(out) == ["run.json"]
    assert (out / "run.json").read_text() == "old"


def refused(out, says):
    with pytest.raises(BarberError, match=says), claimed(out, True, []):
        pytest.fail("the work began")
    untouched(out)


def test_a_place_that_will_do_is_left_as_it_is(out):
    with claimed(out, True, []):
        (out.parent / ".out.lock").unlink()
        untouched(out)
    with claimed(out.parent / "parent" / "new", False, []):
        assert os.listdir(out.parent / "parent") == [".new.lock"]
    untouched(out)


def test_a_mount_point(out, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    refused(out, r"--out .*out is a mount point.*; name a new folder inside it")


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="nothing is mounted at /proc")
@pytest.mark.parametrize("place", ["/", "/proc"])
def test_a_real_mount_point(place):
    for overwrite in (True, False):
        with (
            pytest.raises(BarberError, match=f"--out {place} is a mount point|Permission denied"),
            claimed(Path(place), overwrite, []),
        ):
            pass


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EBUSY, "is a mount point"),  # Bound to a folder of the same file system: `ismount` does not see it.
        (errno.EXDEV, "cannot be moved .Invalid cross-device link"),  # In a lower layer of an overlay.
        (errno.EPERM, "cannot be moved .Operation not permitted"),  # Another user's, in a folder like /tmp.
    ],
)
def test_a_folder_that_cannot_be_moved(number, says, out, monkeypatch):
    rename = Path.rename

    def refusing(self, target):
        if self == out:
            raise OSError(number, os.strerror(number), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    refused(out, f"--out {out} {says}.*choose another folder")


def test_a_file_system_that_renames_no_folders(out, monkeypatch):
    def refusing(self, target):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(self))

    monkeypatch.setattr(Path, "rename", refusing)
    with (
        pytest.raises(BarberError, match=r"cannot write .*new: Function not implemented"),
        claimed(out.with_name("new"), False, []),
    ):
        pass
    untouched(out)


def test_a_file_system_that_replaces_folders_that_are_not_empty(out, monkeypatch):
    rename = Path.rename

    def replacing(self, target):
        shutil.rmtree(target, ignore_errors=True)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", replacing)
    with claimed(out, True, []):
        assert (out / "run.json").read_text() == "old"
    untouched(out)


@pytest.mark.parametrize("inside", [False, True])
def test_no_lock_is_put_into_an_input(inside, out, monkeypatch):
    monkeypatch.setattr("barber_jax.convert.export.output_lock", lambda path: pytest.fail(f"{path} was locked"))
    with pytest.raises(BarberError, match="is or is inside"), claimed(out / "new" if inside else out, True, [out]):
        pass


def test_what_a_run_reads_is_not_deleted_as_what_a_killed_one_left(out):
    given = out.with_name("new.partial")
    out.rename(given)
    for place, inputs in ((out.with_name("new"), [given]), (given, [])):
        with pytest.raises(BarberError, match=r"new\.partial"), claimed(place, True, inputs):
            pass
    assert os.listdir(out.parent) == [given.name] and os.listdir(given) == ["run.json"]


def test_what_was_put_in_place_of_the_runs_folder_is_not_published(tiny, tmp_path):
    with claimed(tmp_path / "out", False, []):
        with (
            pytest.raises(BarberError, match=r"cannot write .*out\.partial was removed or replaced"),
            FolderWriter(tmp_path / "out", HFFolder(tiny())) as writer,
        ):
            writer.finish(set())
            writer.folder.rename(tmp_path / "moved")
            writer.folder.mkdir()
            (writer.folder / "other").touch()
            writer.publish()
        # Nor is it removed.
        assert (tmp_path / "out.partial" / "other").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_what_came_to_the_final_name_meanwhile_is_not_replaced(tiny, tmp_path, earlier):
    out, source = tmp_path / "out", HFFolder(tiny())
    if earlier:
        out.mkdir()
        (out / "run.json").touch()
    with claimed(out, True, []), FolderWriter(out, source) as writer:
        writer.finish(set())
        if earlier:
            out.rename(tmp_path / "moved")
        out.mkdir()
        (out / "mine").touch()
        with pytest.raises(BarberError, match="out was not there when the run began, so it is not replaced; move"):
            writer.publish()
    assert os.listdir(out) == ["mine"] and not (tmp_path / "out.partial").exists()


def test_a_file_that_was_put_in_place_of_the_tensors_is_not_taken(tmp_path):
    path, partial = tmp_path / "a.safetensors", tmp_path / "a.safetensors.partial"
    writer = SafetensorsWriter(path, {"a": (np.dtype(np.float32), (2,))})
    writer.write("a", np.zeros(2, np.float32))
    partial.unlink()
    partial.write_text("of another process")
    with pytest.raises(BarberError, match=f"cannot write {path}: another file has taken its place"):
        writer.close()
    assert not path.exists() and partial.read_text() == "of another process"


def test_the_lock_is_held_until_the_end_and_not_longer(out):
    with claimed(out, True, []), pytest.raises(BarberError, match="is being written by process"), output_lock(out):
        pass
    with output_lock(out):
        pass
