"""Errors that a user can mend, and how a command line shows them: one line."""

import os
import sys
from collections.abc import Callable

from barber_jax.console import interrupt


class BarberError(Exception):
    """A mistake that the user can mend: one line that names the file, option or tensor, and the way out."""


class DamagedInput(BarberError):
    """An input is damaged and must be fetched again, so that an unfinished run cannot be resumed with it."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn `BarberError` into `error: ...` on stderr and exit status 2.

    So is an `OSError` that names a file.
    """
    # transformers says on import that models need PyTorch; no command of ours uses its models without asking for torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    interrupt.watch()
    try:
        with interrupt.translated():
            main()
    except BarberError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        # A path that the system refuses (too long, forbidden, gone meanwhile). Without a name it is no such thing.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; give another path or mend this one", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        interrupt.unwatch()
