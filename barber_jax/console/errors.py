"""Errors, and how a command reports them: as one line on stderr."""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from barber_jax.console import interrupt, streams

MAX_WORD, MAX_LINE = 300, 1500
"""Characters that an error line shows of a word, and of the whole message; more is cut out of the middle."""


class BarberError(Exception):
    """An error that the user can fix: its one-line message names the file, option or tensor and says what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class DamagedInput(BarberError):
    """An input file is damaged or unfit and must be replaced, after which an unfinished run cannot be resumed."""


def one_line(text: object) -> str:
    """A text as one line of moderate length: blanks joined, control characters escaped, long quotations shortened.

    This is the one place where messages are shortened. What is cut is in the middle: a message begins with the culprit
    and ends with the way out.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return _middle_cut(re.sub(rf"\S{{{MAX_WORD},}}", lambda word: _middle_cut(word[0], MAX_WORD), line), MAX_LINE)


def _middle_cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Run a command's `main` and report every exception as one line `error: ...` on stderr, without a traceback.

    Exit status: 2 for what the user can fix (`BarberError`, an `OSError` that names a file, and the causes that
    `causes.explain` knows), 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, and 1 for anything else, whose traceback
    goes into a log file that the line names. Python warnings are shown after a success; beside an error they would be a
    second line. A stderr that cannot be written changes nothing.
    """
    # Imported here: `causes` needs the classes above.
    from barber_jax.console import causes

    # On import transformers warns that PyTorch is missing; commands that need PyTorch check for it themselves.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    streams.protect()
    interrupt.install_handler()
    try:
        with causes.held_warnings(), interrupt.reraised():
            main()
            sys.stdout.flush()
    except (SystemExit, GeneratorExit):
        _flush_results()
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        exit_for(error)
    finally:
        interrupt.settle_exit()


def exit_for(error: BaseException) -> NoReturn:
    """Report an exception that ends the process, as `exit_with_one_line` says."""
    from barber_jax.console import causes

    if isinstance(error, KeyboardInterrupt):
        _fail(interrupt.message(), interrupt.exit_status())
    if isinstance(error, BarberError):
        _fail(str(error), 2)
    known = causes.explain(error)
    _fail(*((known, 2) if known else (causes.unexpected(error), 1)))


def _flush_results() -> None:
    """Write what is left of standard output; an error there would be a second one."""
    with contextlib.suppress(BarberError, OSError, ValueError, AttributeError):
        sys.stdout.flush()


def _fail(message: str, status: int) -> NoReturn:
    _flush_results()
    print("error: " + one_line(message), file=sys.stderr)
    raise SystemExit(status) from None
