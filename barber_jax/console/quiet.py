"""Keep what libraries write to stderr by themselves from standing beside an error's one line."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def held_stderr() -> Iterator[None]:
    """Context manager that holds back what is written to file descriptor 2, by native code too, until the end.

    After an exception it is dropped: a panic of a library written in Rust is printed before Python can catch it.
    """
    try:
        original, held = os.dup(2), tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:
        # No stderr, or no place for a temporary file: nothing can be held back.
        yield
        return
    with held:
        try:
            os.dup2(held.fileno(), 2)
            yield
        except BaseException:
            os.dup2(original, 2)
            raise
        else:
            os.dup2(original, 2)
            held.seek(0)
            with contextlib.suppress(OSError):
                while piece := held.read(2**16):
                    os.write(2, piece)
        finally:
            os.close(original)


@contextlib.contextmanager
def silenced(logger: str) -> Iterator[None]:
    """Context manager without the log lines of a library, whose exceptions are reported by the caller."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
