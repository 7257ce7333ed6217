"""Ctrl-C that is not lost: a `KeyboardInterrupt` raised within a callback of JAX's (on garbage collection, say) goes no
further, so that a run would go on as if nobody had asked it to end.
"""

import signal
from types import FrameType

_noticed = False


def watch() -> None:
    """Remember Ctrl-C from now on, besides raising `KeyboardInterrupt`; from the main thread, and not where a shell has
    set it to be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _notice)


def check() -> None:
    """Raise `KeyboardInterrupt` if there was one."""
    if _noticed:
        raise KeyboardInterrupt


def _notice(signum: int, frame: FrameType | None) -> None:
    global _noticed
    _noticed = True
    raise KeyboardInterrupt
