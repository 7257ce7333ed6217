"""Ctrl-C that is not lost: a `KeyboardInterrupt` raised within a callback of JAX's (on garbage collection, say) goes no
further, so that a run would go on as if nobody had asked it to end.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_noticed = False


def watch() -> None:
    """Remember Ctrl-C from now on, besides raising `KeyboardInterrupt`; from the main thread, and not where a shell has
    set it to be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _notice)


def unwatch() -> None:
    """Let Ctrl-C end the process at once, without a traceback out of some clean-up at its exit."""
    if signal.getsignal(signal.SIGINT) is _notice:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn the error that an interrupted C++ function may raise in its place back into `KeyboardInterrupt`."""
    try:
        yield
    except Exception:
        check()
        raise


def check() -> None:
    """Raise `KeyboardInterrupt` if there was one."""
    if _noticed:
        raise KeyboardInterrupt


def _notice(signum: int, frame: FrameType | None) -> None:
    global _noticed
    _noticed = True
    raise KeyboardInterrupt
