"""Before a command has imported its libraries, what goes wrong ends in one line, too."""

import os
import subprocess
import sys

import pytest

from barber_jax.console import startup
from barber_jax.console.errors import BarberError

COMMANDS = (
    *("prune", "report", "convert", "convert.apply_masks", "eval.perplexity", "eval.zero_shot", "eval.benchmark"),
    *("eval.demo", "eval.synthetic", "eval.device_check", "eval.train_opt"),
)
"""Modules that import a large library at their top."""


def ending(module, **options):
    """Exit status, and the lines on stderr, of a command without options."""
    process = subprocess.run(
        [sys.executable, "-m", f"barber_jax{module}"], capture_output=True, text=True, timeout=120, **options
    )
    assert not process.stdout
    return process.returncode, process.stderr.splitlines()


def with_library(folder, name, code):
    """Environment of a process in which the library `name` is nothing but `code`."""
    (folder / f"{name}.py").write_text(code)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"env": os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder)}}


LACK = "raise ImportError('numpy.so: failed to map segment from shared object')"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_library_that_finds_no_memory(command, tmp_path):
    (tmp_path / "jax.py").write_text(LACK)
    status, (line,) = ending(f".{command}", **with_library(tmp_path, "numpy", LACK))
    assert status == 2
    assert line.startswith("error: out of memory (numpy.so: failed to map segment") and "ulimit -v" in line


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise MemoryError", 2, "error: out of memory; raise the limit"),
        ('raise RuntimeError("can\'t start new thread")', 2, "error: the system starts no more threads"),
        ("import os; os.kill(os.getpid(), 15)", 143, "error: interrupted by SIGTERM"),
        ("raise ValueError('odd')", 1, "error: unexpected ValueError: odd; this is a fault"),
    ],
)
@pytest.mark.parametrize("module", [".report", ""])
def test_whatever_importing_raises(module, code, status, said, tmp_path):
    environment = with_library(tmp_path, "jax", code)
    line = [sys.executable, "-m", f"barber_jax{module}", *([] if module else ["report"]), str(tmp_path)]
    process = subprocess.run(line, capture_output=True, text=True, timeout=120, **environment)
    assert process.returncode == status and not process.stdout
    (line,) = process.stderr.splitlines()
    assert line.startswith(said)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
@pytest.mark.parametrize("gigabytes", [0.3, 0.7, 1.4])
def test_where_jax_cannot_start(gigabytes):
    """Without the trial these ended in a traceback, an exit status of 127, and aborts."""
    line = f'ulimit -v {int(gigabytes * 1e9 / 1024)} && exec "$0" -m barber_jax.prune'
    process = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and not process.stdout
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: JAX does not start") and f"limited to {gigabytes:.2f} GB; raise" in line


def test_only_small_limits_are_tried(monkeypatch):
    tried, ended = [], subprocess.CompletedProcess([], -6)
    monkeypatch.setattr(startup.subprocess, "run", lambda line, **_: tried.append(line[-1]) or ended)
    for limit in (None, startup.TRIED_BELOW):
        monkeypatch.setattr(startup, "_limit", lambda limit=limit: limit)
        startup.check_memory()
    assert not tried
    monkeypatch.setattr(startup, "_limit", lambda: 4 * 10**9)
    with pytest.raises(BarberError, match=r"JAX does not start \(SIGABRT\) where memory is limited to 4\.00 GB"):
        startup.check_memory()
    assert tried == [str(4 * 10**9 - startup.SPARE)]


def test_nothing_is_installed_by_importing_the_package():
    code = "import sys; before = sys.excepthook; import barber_jax.config; assert sys.excepthook is before"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
