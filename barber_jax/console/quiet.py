"""Keep what libraries write by themselves from standing beside an error's one line, or among results."""

import contextlib
import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from barber_jax.console.errors import BarberError


@contextlib.contextmanager
def held_output() -> Iterator[None]:
    """Context manager that holds back what is written to file descriptors 1 and 2, by native code too, until the end.

    It then goes to stderr: what a library says is no result. After an exception it is dropped: a panic of a library
    written in Rust is printed before Python can catch it.
    """
    with contextlib.suppress(BarberError, OSError, ValueError, AttributeError):
        # What this program has printed before stays where it belongs.
        sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        try:
            originals = {}
            for descriptor in (1, 2):
                originals[descriptor] = os.dup(descriptor)
                stack.callback(os.close, originals[descriptor])
            held = stack.enter_context(tempfile.TemporaryFile())
        except OSError:
            # No stream, or no place for a temporary file: nothing can be held back.
            originals = {}
        try:
            for descriptor in originals:
                os.dup2(held.fileno(), descriptor)
            yield
        finally:
            for descriptor, original in originals.items():
                os.dup2(original, descriptor)
        if originals:
            held.seek(0)
            with contextlib.suppress(OSError):
                while piece := held.read(2**16):
                    os.write(2, piece)


@contextlib.contextmanager
def silenced(logger: str) -> Iterator[None]:
    """Context manager without the log lines of a library, whose exceptions are reported by the caller."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def ignore_lost_tasks() -> None:
    """From now on asyncio says nothing of tasks that nobody waits for, nor of results that come after its loop's end.

    Orbax reads and writes many arrays at a time. When one of them fails, it raises that error and leaves the others.
    """
    if not isinstance(sys.unraisablehook, _WithoutLostTasks):
        sys.unraisablehook = _WithoutLostTasks(sys.unraisablehook)
    logger = logging.getLogger("asyncio")
    if _is_heard not in logger.filters:
        logger.addFilter(_is_heard)


class _WithoutLostTasks:
    def __init__(self, before: Callable[[Any], object]):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        # A coroutine that nobody waits for is closed when it is collected, and may make an error of its own of that.
        closed_loop = issubclass(unraisable.exc_type, RuntimeError) and "loop is closed" in str(unraisable.exc_value)
        if not (closed_loop or inspect.iscoroutine(unraisable.object)):
            self._before(unraisable)


def _is_heard(record: logging.LogRecord) -> bool:
    lost = ("Task exception was never", "Future exception was never", "Task was destroyed")
    return not str(record.msg).startswith(lost)
