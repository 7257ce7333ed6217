"""Standard streams that cannot be written: closed, on a full disk, or a terminal that is gone.

What a run prints on stderr helps whoever watches; it is never a reason for the run to fail. Results on stdout are.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_ERRORS = (OSError, ValueError)  # ValueError: the stream is closed


class ForgivingStream:
    """A text stream whose errors of writing are ignored; everything else is the given stream's.

    A line that cannot be written is lost, later ones are tried again: a full disk may have room by then.

    Args:
        stream: None stands for one that was closed before the process began.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = _null() if stream is None else stream

    def write(self, text: str) -> int:
        """Write `text` if possible; return its length."""
        with contextlib.suppress(*_ERRORS):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines) -> None:
        """Write several texts, as `write`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with contextlib.suppress(*_ERRORS):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal that is still there."""
        with contextlib.suppress(*_ERRORS):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ResultStream:
    """Standard output: what cannot be written is a `BarberError`, once; everything else is the given stream's.

    Python itself would print such an error as a traceback, when the command has ended.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` and return its length. Raises `BarberError`."""
        with self._told():
            return self._stream.write(text)

    def writelines(self, lines) -> None:
        """Write several texts, as `write`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream. Raises `BarberError`."""
        with self._told():
            self._stream.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # `errors` needs this module.
            from barber_jax.console.errors import BarberError

            with contextlib.suppress(*_ERRORS):
                # What is left in Python's buffer goes there.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            raise BarberError(
                f"standard output cannot be written: {error.strerror}; what was printed last is lost, print elsewhere"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> None:
    """From now on a standard error that cannot be written stops no command, and a standard output that cannot is one
    line. For the start of a process.

    Descriptors 0 to 2 that are closed are opened on the null device: the next file that is opened would get their
    numbers, and what libraries print would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = _null()
    if not isinstance(sys.stdout, ResultStream):
        if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
            # Another encoding than UTF-8 may lack letters of a name: no reason to lose results.
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout = ResultStream(sys.stdout)
    if not isinstance(sys.stderr, ForgivingStream):
        sys.stderr = ForgivingStream(sys.stderr)


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
