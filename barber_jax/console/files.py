"""Errors of the file system, turned into one line that names the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from barber_jax.console.errors import BarberError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one that names the file: `path`, or the copy in it that failed."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or error
        raise BarberError(
            f"cannot write {error.filename2 or path}: {cause}; make room there or write to another place"
        ) from error
