"""One lock per output folder, so that two commands never write into the same one; and folders known by what they are.

The lock of DIR is the file `.DIR.lock` beside it, whichever way DIR is spelled. The system releases it when the process
that holds it ends, however it ends. The file is removed with the lock; one that a killed process leaves means nothing.
"""

import contextlib
import datetime
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand, writing

WAIT_S = 0.5
"""Seconds to wait for a command that is just ending."""
MAX_COMMAND = 200
"""Characters shown of the command line of the process that holds a lock."""
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def output_lock(folder: Path, kind: str = "folder") -> Iterator[None]:
    """Context manager that locks an output folder, or a file (`kind` "file"), which need not exist.

    Missing parents are created; on leaving, those of them that are still empty are removed. Where the parent is
    read-only, so that no command can replace the folder itself, the lock file is in the folder.

    Raises:
        BarberError: another command holds the lock; the message says which. Or the lock file cannot be created.
    """
    folder = Path(os.path.realpath(expand(folder)))
    with contextlib.ExitStack() as stack:
        with writing(folder):
            for parent in _missing_parents(folder):
                with contextlib.suppress(FileExistsError):
                    parent.mkdir()
                    stack.callback(_remove_if_empty, parent)
            path = folder.with_name(f".{folder.name}.lock") if folder.name else folder / ".lock"
            try:
                stack.enter_context(_held(path, folder, kind))
            except OSError as error:
                if path.exists() and isinstance(error, PermissionError):
                    raise BarberError(
                        f"{folder}: its lock {path} belongs to another user, who writes there or whose command was "
                        f"killed; if nobody does, delete that file, or choose another {kind}"
                    ) from error
                if error.errno not in _READ_ONLY or not folder.is_dir():
                    raise
                stack.enter_context(_held(folder / ".lock", folder, kind))
        yield


@contextlib.contextmanager
def _held(path: Path, folder: Path, kind: str) -> Iterator[None]:
    """Context manager that holds the lock file `path` of `folder`."""
    # Waiting also covers a holder that removes the file between our opening and locking it.
    lock = FileLock(path, timeout=WAIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise BarberError(
            f"{folder} is being written by {_holder(path)}; wait until that has ended, or choose another {kind}"
        ) from None
    try:
        if isinstance(lock, SoftFileLock):
            # On a file system without locks the library uses the file's existence, and a content of its own.
            yield
            return
        mine = os.stat(path)
        # Who holds the lock is only for a message; on a full disk it stays empty.
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(_this_process()) + "\n", encoding="utf-8")
        try:
            yield
        finally:
            # Removed while it is held: whoever has opened it meanwhile finds it gone and tries again.
            with contextlib.suppress(OSError):
                if os.path.samestat(mine, os.lstat(path)):
                    path.unlink()
    finally:
        lock.release()


def _this_process() -> dict[str, str | int]:
    program, *arguments = sys.orig_argv or [""]
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(program).name, *arguments])[:MAX_COMMAND],
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _holder(path: Path) -> str:
    """Describe the process that holds a lock, from the content of the lock file, which anybody may have written."""
    try:
        with open(path, "rb") as file:
            content = documents.parse(file.read(4096).decode("utf-8"))
        pid, host, command, since = (str(content[key]) for key in ("pid", "host", "command", "since"))
    except (OSError, ValueError, TypeError, KeyError):
        return f"another command (lock file {path})"
    text = f"process {pid[:20]} on {host[:100]} since {since[:40]}: {command[:MAX_COMMAND]}"
    return "".join(character if character.isprintable() else "?" for character in text)


def _missing_parents(folder: Path) -> list[Path]:
    """The parents of a folder that do not exist, the outermost first."""
    missing = []
    for parent in folder.parents:
        if parent.exists():
            break
        missing.insert(0, parent)
    return missing


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class FolderIdentity:
    """A folder that this process made, known by what it is and not by its name.

    Its open descriptor keeps the system from giving its number to another folder, should it be deleted.
    """

    def __init__(self, folder: Path):
        self._descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else -1
        self._stat = os.stat(folder)

    def is_at(self, path: Path) -> bool:
        """Whether the folder is what has this name now."""
        try:
            return os.path.samestat(self._stat, os.lstat(path))
        except OSError:
            return False

    def close(self) -> None:
        """Forget the folder. May be called more than once."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
