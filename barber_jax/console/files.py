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


class FileState:
    """What a file is when it is opened: what is read later, by its name again, must be of the same file.

    While a command works for hours, another one may replace a checkpoint that it reads: half of the one and half of the
    other would be a model that nobody has made.
    """

    def __init__(self, path: Path):
        self._path, self._state = path, self._now(path)

    def check(self) -> None:
        """Raise `BarberError` if the file was changed, replaced or removed since."""
        try:
            same = self._now(self._path) == self._state
        except OSError:
            same = False
        if not same:
            raise BarberError(f"{self._path}: changed, replaced or removed while it was read; run the command again")

    @staticmethod
    def _now(path: Path) -> tuple[int, int]:
        # Not its inode, which some network file systems make up anew.
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns


def expand(path: str | Path) -> Path:
    """Expand `~` and `~user` at the beginning of a path.

    Raises:
        BarberError: there is no such user, or (in some containers) the user of this process has no home folder.
    """
    expanded = Path(os.path.expanduser(path))
    if expanded.parts[:1] and expanded.parts[0].startswith("~") and not os.path.lexists(expanded):
        raise BarberError(f"{path}: no home folder is known for {expanded.parts[0]}; write the path in full")
    return expanded
