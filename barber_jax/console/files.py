"""Paths: `~` in them; errors while writing, and files that were never fetched, as `BarberError`s that name them."""

import contextlib
import os
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


def expand(path: str | Path) -> Path:
    """Expand `~` and `~user` at the beginning of a path.

    Raises:
        BarberError: there is no such user, or (in some containers) the user of this process has no home folder.
    """
    expanded = Path(os.path.expanduser(path))
    if expanded.parts[:1] and expanded.parts[0].startswith("~") and not os.path.lexists(expanded):
        raise BarberError(f"{path}: no home folder is known for {expanded.parts[0]}; write the path in full")
    return expanded
