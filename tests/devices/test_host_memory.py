"""How much host memory is said to be available, from files as Linux writes them."""

import pytest

from barber_jax.devices import host_memory


@pytest.fixture
def linux(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "current", "available"),
    [
        ("max", "5000", 1024000),
        ("600000", "400000", 200000),
        ("9000000", "0", 1024000),
        ("5", "9", 0),
        ("?", "9", 1024000),
    ],
)
def test_the_least_of_system_and_container(limit, current, available, linux):
    (linux / "memory.max").write_text(f"{limit}\n")
    (linux / "memory.current").write_text(f"{current}\n")
    assert host_memory.available_bytes() == available


def test_without_these_files(linux):
    assert host_memory.available_bytes() == 1024000
    (linux / "meminfo").write_text("nothing")
    # Half of what there is, or not known at all.
    assert (host_memory.available_bytes() or 1) > 0
