"""A stderr that is closed, full or gone changes neither a command's work nor its exit status."""

import io
import os
import subprocess
import sys

import pytest

from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Progress
from barber_jax.console.streams import ForgivingStream

COMMAND = """
import logging, os, sys, warnings
from barber_jax.console import BarberError, exit_with_one_line
from barber_jax.console.progress import Progress
def main():
    # On a closed descriptor 2 this file would get what libraries print.
    with open(sys.argv[1], "wb") as file, Progress() as progress, progress.phase("work", 2, announce=True) as phase:
        assert file.fileno() > 2
        warnings.warn("a warning")
        logging.warning("a line")
        print("x" * 100_000, file=sys.stderr)
        os.write(2, b"of a library") if sys.argv[2] != "full" else None
        progress.say("a line")
        phase.advance()
        file.write(b"done")
    if sys.argv[3] == "fail":
        raise BarberError("a mistake")
exit_with_one_line(main)
"""


@pytest.mark.parametrize(
    ("kind", "redirection"), [("closed", "2>&-"), ("all closed", "<&- >&- 2>&-"), ("full", "2>/dev/full")]
)
@pytest.mark.parametrize(("end", "status"), [("succeed", 0), ("fail", 2)])
def test_the_exit_status_is_that_of_the_run(kind, redirection, end, status, tmp_path):
    line = f'exec "$0" -c "$1" "$2" "$3" "$4" {redirection}'
    process = subprocess.run(["sh", "-c", line, sys.executable, COMMAND, tmp_path / "file", kind, end], timeout=60)
    assert process.returncode == status
    assert (tmp_path / "file").read_bytes() == b"done"


def test_the_exit_status_where_nobody_reads_any_more(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, tmp_path / "file", "full", "succeed"], stderr=subprocess.PIPE
    )
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "file").read_bytes() == b"done"


RESULTS = """
import sys
from barber_jax.console import BarberError, exit_with_one_line
def main():
    for _ in range(int(sys.argv[1])):
        print("\\N{SNOWMAN} " + "x" * 1000)
    if sys.argv[2] == "fail":
        raise BarberError("a mistake")
exit_with_one_line(main)
"""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("lines", [1, 1000], ids=["written at the end", "written at once"])
def test_results_that_cannot_be_written_are_one_line(lines):
    line = 'exec "$0" -c "$1" "$2" "$3" > /dev/full'
    arguments = ["sh", "-c", line, sys.executable, RESULTS, str(lines), "succeed"]
    process = subprocess.run(arguments, capture_output=True, env=BUFFERED)
    assert process.returncode == 2
    (said,) = process.stderr.decode().splitlines()
    assert said.startswith("error: standard output cannot be written: No space left on device; what was printed")


def test_results_that_nobody_reads_beside_an_error():
    process = subprocess.Popen(
        [sys.executable, "-c", RESULTS, "1", "fail"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED
    )
    process.stdout.close()
    assert process.stderr.read() == b"error: a mistake\n" and process.wait(timeout=60) == 2


def test_letters_that_standard_output_lacks():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-c", RESULTS, "1", "succeed"]
    process = subprocess.run(line, capture_output=True, env=environment, timeout=60)
    assert (process.returncode, process.stderr) == (0, b"") and process.stdout.startswith(b"\\u2603 xxx")


class Broken(io.StringIO):
    """A stream that breaks and is mended."""

    broken = True

    def write(self, text):
        if self.broken:
            raise OSError(28, "No space left on device")
        return super().write(text)

    flush = isatty = lambda self: self.write("")


def test_later_lines_are_tried_again():
    broken = Broken()
    stream = ForgivingStream(broken)
    assert stream.write("lost\n") == 5 and not stream.isatty()
    stream.flush()
    broken.broken = False
    print("kept", file=stream)
    assert broken.getvalue() == "kept\n"


@pytest.mark.parametrize("stream", [None, Broken(), io.StringIO()], ids=["None", "broken", "closed"])
def test_progress_from_python(stream, monkeypatch):
    if stream is not None and not isinstance(stream, Broken):
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(BarberError), Progress() as progress, progress.phase("work", 1, announce=True) as phase:
        progress.say("a line")
        phase.advance()
        raise BarberError("reached")
