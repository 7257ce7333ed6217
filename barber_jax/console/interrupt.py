"""Handle Ctrl-C, SIGTERM and SIGHUP reliably, and alike: the run ends with `KeyboardInterrupt`, and can be resumed.

A `KeyboardInterrupt` raised inside a callback of JAX (during garbage collection, for example) is swallowed there, after
Python has printed its traceback, and the run would continue. The signal handler here also remembers the interrupt,
`check` raises it again, and no traceback is printed.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_DEFAULTS = {
    getattr(signal, name): default
    for name, default in (
        ("SIGINT", signal.default_int_handler),
        ("SIGTERM", signal.SIG_DFL),
        ("SIGHUP", signal.SIG_DFL),  # Windows has no SIGHUP.
    )
    if hasattr(signal, name)
}
"""Signals that end a run -> their handler in a Python process that was started without special settings."""

_received: int | None = None
_process = 0
_deferring = 0


def install_handler() -> None:
    """From now on remember the signals, besides raising `KeyboardInterrupt`. Call it from the main thread.

    A signal that is set to be ignored stays ignored: SIGINT of a shell's background job, SIGHUP under nohup.
    """
    global _process
    _process = os.getpid()
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    for number, default in _DEFAULTS.items():
        if signal.getsignal(number) == default:
            signal.signal(number, _handle)


def settle_exit() -> None:
    """From now on no signal changes the exit status: the command has done its work, or has said why it could not.

    Python and its libraries may take a while to end. SIGTERM and SIGHUP are ignored then, so that a finished run does
    not look like a failed one; Ctrl-C ends the process at once, without a traceback.
    """
    for number in _DEFAULTS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


@contextlib.contextmanager
def reraised() -> Iterator[None]:
    """Raise `KeyboardInterrupt` in place of any other error after an interrupt: C++ code may raise its own."""
    try:
        yield
    except Exception:
        check()
        raise


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold an interrupt back until the end of the body: for steps that must all be done, or none."""
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
    if not _deferring:
        check()


def check() -> None:
    """Raise `KeyboardInterrupt` if a signal came since `install_handler`."""
    if received():
        raise KeyboardInterrupt


def received() -> bool:
    """Whether a signal came since `install_handler`."""
    return _received is not None


def message() -> str:
    """What ended the run, for its last line."""
    return "interrupted" if _received in (None, signal.SIGINT) else f"interrupted by {signal.Signals(_received).name}"


def exit_status() -> int:
    """Exit status after an interrupt, as shells have it: 128 and the signal's number, so 130 for Ctrl-C."""
    return 128 + (signal.SIGINT if _received is None else _received)


class _UnraisableHook:
    """Says nothing of an interrupt, which is remembered, where it cannot be raised; else what `before` says."""

    def __init__(self, before: Callable[[Any], object]):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if not (received() and issubclass(unraisable.exc_type, KeyboardInterrupt)):
            self._before(unraisable)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if os.getpid() != _process:
        # A forked worker process, which its parent ends with SIGTERM.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    first = _received is None
    if first:
        _received = number
    # A closing terminal, or a scheduler, sends several signals: those after the first one must not interrupt the
    # clean-up. Who presses Ctrl-C again means it.
    if not _deferring and (first or number == signal.SIGINT):
        raise KeyboardInterrupt
