"""Handle Ctrl-C reliably.

A `KeyboardInterrupt` raised inside a callback of JAX (during garbage collection, for example) is swallowed there, and
the run would continue. The signal handler here also remembers the interrupt, and `check` raises it again.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_interrupted = False


def install_handler() -> None:
    """From now on remember Ctrl-C, besides raising `KeyboardInterrupt`. Call it from the main thread.

    Does nothing where the shell has set SIGINT to be ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)


def exit_on_interrupt() -> None:
    """From now on let Ctrl-C end the process at once, so that clean-up at exit prints no traceback."""
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def reraised() -> Iterator[None]:
    """Raise `KeyboardInterrupt` in place of any other error after Ctrl-C: interrupted C++ code may raise its own."""
    try:
        yield
    except Exception:
        check()
        raise


def check() -> None:
    """Raise `KeyboardInterrupt` if Ctrl-C was pressed since `install_handler`."""
    if _interrupted:
        raise KeyboardInterrupt


def _handle(signum: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt
