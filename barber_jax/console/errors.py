"""Errors that the user can fix, and how a command reports them: as one line on stderr."""

import os
import sys
from collections.abc import Callable

from barber_jax.console import interrupt, streams


class BarberError(Exception):
    """An error that the user can fix: its one-line message names the file, option or tensor and says what to do."""


class DamagedInput(BarberError):
    """An input file is damaged or unfit and must be replaced, after which an unfinished run cannot be resumed."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's `main` and report expected errors as one line `error: ...` on stderr, without a traceback.

    `BarberError` and any `OSError` that names a file give exit status 2, Ctrl-C gives 130, SIGTERM 143, SIGHUP 129.
    A stderr that cannot be written changes nothing.
    """
    # On import transformers warns that PyTorch is missing; commands that need PyTorch check for it themselves.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    streams.protect()
    interrupt.install_handler()
    try:
        with interrupt.reraised():
            main()
    except BarberError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        # With a file name it is a path that the system refuses: too long, not permitted, or deleted meanwhile.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; fix this path or give another path", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"error: {interrupt.message()}", file=sys.stderr)
        raise SystemExit(interrupt.exit_status()) from None
    finally:
        interrupt.exit_on_interrupt()
