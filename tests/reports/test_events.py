"""TensorBoard events: what is in the file, and what is said without the package or without space."""

import math
import struct
import sys

import pytest

from barber_jax.console.errors import BarberError
from barber_jax.reports import events
from barber_jax.reports.events import EventLog


def read(folder):
    """Events of all files in a folder: each has its length (8 bytes), a checksum (4), itself, and a checksum (4)."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


@pytest.fixture
def log(tmp_path):
    pytest.importorskip("tensorboardX")
    return EventLog(tmp_path / "logs" / "run")


def test_scalars_by_step(log, tmp_path):
    log.scalars(1, {"train/loss": 0.75, "train/rate": 1e-3})
    log.scalars(2, {"train/loss": math.nan})
    log.close()
    log.close()
    version, one, two = read(tmp_path / "logs" / "run")
    assert version.file_version == "brain.Event:2"
    assert (one.step, {each.tag: each.simple_value for each in one.summary.value}) == (
        1,
        {"train/loss": 0.75, "train/rate": pytest.approx(1e-3)},
    )
    assert two.step == 2 and math.isnan(two.summary.value[0].simple_value)
    assert version.wall_time <= one.wall_time <= two.wall_time


def test_a_resumed_run_replaces_later_steps_and_keeps_the_file(log, tmp_path):
    log.scalars(9, {"loss": 1.0})
    log.close()
    (before,) = (tmp_path / "logs" / "run").iterdir()
    before = before.rename(before.with_name("events.out.tfevents.0"))
    again = EventLog(tmp_path / "logs" / "run", start=5)
    again.close()
    assert before.is_file()
    begun = read(tmp_path / "logs" / "run")[-1]
    assert begun.step == 6 and begun.session_log.status == begun.session_log.START


def test_values_can_be_seen_while_the_run_goes_on(log, tmp_path, monkeypatch):
    monkeypatch.setattr(events, "FLUSH_SECONDS", 0.0)
    log.scalars(1, {"loss": 1.0})
    assert [each.step for each in read(tmp_path / "logs" / "run")] == [0, 1]
    log.close()


def test_without_the_package(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(BarberError, match=r"tensorboardX.* is not installed; pip install 'barber_jax\[log\]'"):
        EventLog(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(BarberError, match=r"cannot write .*file"):
        EventLog(tmp_path / "file")


def test_a_full_disk_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    log = EventLog(tmp_path)
    monkeypatch.setattr(events, "FLUSH_SECONDS", 0.0)
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patched:
        patched.setattr(log._writer._py_recordio_writer, "_writer", full)
        with pytest.raises(BarberError, match="No space left"):
            log.scalars(1, {"loss": 1.0})
    log.close()
