"""The one error a user is meant to see, and how a command line shows it."""

import sys
from collections.abc import Callable


class BarberError(Exception):
    """A mistake the user can mend: one line that names the file, option or tensor, and the way out."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn `BarberError` into `error: ...` on stderr and exit status 2."""
    try:
        main()
    except BarberError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
