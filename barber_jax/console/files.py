"""Turn operating-system errors while writing, and files that were never fetched, into `BarberError`s that name them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from barber_jax.console.errors import BarberError

_POINTER = b"version https://git-lfs.github.com/spec/"


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


def check_fetched(path: Path) -> None:
    """Raise `BarberError` if a file is a Git LFS pointer, which stands for content that was not fetched."""
    with contextlib.suppress(OSError), open(path, "rb") as handle:
        if handle.read(len(_POINTER)) == _POINTER:
            raise BarberError(
                f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull` or download the file"
            )
