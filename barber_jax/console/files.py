"""Turn operating-system errors while writing into `BarberError`s that name the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from barber_jax.console.errors import BarberError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns an `OSError` into a `BarberError` that names the file.

    The file is the destination of the failed copy or rename where the error has one, else `path`.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or error
        raise BarberError(
            f"cannot write {error.filename2 or path}: {cause}; free some space there or write to another place"
        ) from error
