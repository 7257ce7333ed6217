"""Notes: single lines on stderr about what a user should know but need not act on."""

import contextlib
import sys

_silent = False


def note(line: str) -> None:
    """Print `note: <line>` on stderr, unless this process has been silenced or stderr cannot be written."""
    # Given None, as where stderr was closed at the start, print would write to stdout.
    if not _silent and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print("note: " + " ".join(line.split()), file=sys.stderr, flush=True)


def silence() -> None:
    """Print no notes from now on, in the processes of a multi-process run other than the primary one."""
    global _silent
    _silent = True
