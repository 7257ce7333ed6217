"""Files and folders that a command writes: seen whole or not at all, and by one command at a time."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand, writing
from barber_jax.console.locks import FolderIdentity, output_lock

PARTIAL = ".partial"
"""Suffix of an output folder's name until it is complete."""


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name beside it, which is then replaced by `path`'s.

    A link stays one, and a file keeps its permissions. What another file cannot take the place of is written as it is:
    a device or pipe, such as /dev/stdout, and a file in a folder that is read-only.

    Raises:
        BarberError: the file cannot be written; one that was there is as it was.
    """
    content = text.encode()
    with writing(path):
        if not _replaceable(path):
            stream = _stream(path)
            with open(path if stream is None else stream, "wb", closefd=stream is None) as file:
                file.write(content)
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
        try:
            partial.write_bytes(content)
            if target.exists():
                shutil.copymode(target, partial)
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def output_file(path: Path | None, option: str = "--json") -> Iterator[Path | None]:
    """Context manager that checks, before any work, that a file can be written, and locks it meanwhile.

    Args:
        path: of the file; for None nothing is done.
        option: by which it was given.

    Yields:
        The path with `~` expanded.

    Raises:
        BarberError: it cannot be written, or another command that writes it is running.
    """
    if path is None:
        yield None
        return
    path = expand(path)
    if path.is_dir() or not path.parent.is_dir():
        raise BarberError(f"{option} {path} is a folder or its folder does not exist; name a file in an existing one")
    if not os.access(path if path.exists() else Path(os.path.realpath(path)).parent, os.W_OK):
        raise BarberError(f"{option} {path} cannot be written; name a file in another folder")
    with output_lock(path, "file") if _replaceable(path) else contextlib.nullcontext():
        yield path


def require_unmounted(out: Path) -> None:
    """Raise `BarberError` if a folder is a mount point: an empty one, too, cannot get another's place."""
    if os.path.ismount(expand(out)):
        raise BarberError(f"{out} is a mount point, which cannot be replaced; name a new folder inside it")


def check_name(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that the unfinished folder of an output folder, which is deleted if it is there, is nobody's.

    Args:
        inputs: files and folders that the command reads.

    Raises:
        BarberError: `out` has the name of another output's unfinished folder, or an input is in its own.
    """
    out = Path(os.path.realpath(expand(out)))
    if out.name.endswith(PARTIAL):
        raise BarberError(f"--out {out}: a name that ends in {PARTIAL} is for unfinished folders; choose another")
    partial = out.parent / f"{out.name}{PARTIAL}"
    for given in inputs:
        path = Path(os.path.realpath(expand(given)))
        if partial in (path, *path.parents):
            raise BarberError(
                f"--out {out}: {given} is in {partial}, which is the place for its unfinished files and would be "
                "deleted; choose another --out, or rename that folder"
            )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context manager that makes a folder to write into, which gets the name `out` at the end of the body.

    `out` must not exist, or be an empty folder. After an exception nothing is left.

    Raises:
        BarberError: the folder has a name for unfinished ones; it cannot be made or renamed; or somebody else has
            removed or replaced it.
    """
    check_name(out)
    out = Path(os.path.realpath(expand(out)))
    folder = out.with_name(out.name + PARTIAL)
    require_unmounted(out)
    with writing(folder):
        # Only a killed command leaves a folder of this name behind.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        identity = FolderIdentity(folder)
    try:
        yield folder
        if not identity.is_at(folder):
            raise BarberError(
                f"cannot write {out}: {folder} was removed or replaced by something else while it was written; "
                "run the same command again"
            )
        with writing(out):
            if out.exists():
                out.rmdir()
            folder.rename(out)
    finally:
        if identity.is_at(folder):
            shutil.rmtree(folder, ignore_errors=True)
        identity.close()


def _replaceable(path: Path) -> bool:
    """Whether a file may take the place of what is at `path` now, if anything is."""
    if path.exists() and (not path.is_file() or _stream(path) is not None):
        return False
    return os.access(Path(os.path.realpath(path)).parent, os.W_OK)


def _stream(path: Path) -> int | None:
    """Descriptor of this process's standard output or error if that is what `path` is: `--json /dev/stdout > FILE`."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None
