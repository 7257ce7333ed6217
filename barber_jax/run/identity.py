"""What identifies an unfinished run, in identity.json of its folder: options that matter, and hashes of inputs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from barber_jax.console import documents
from barber_jax.console.errors import BarberError

IDENTITY = "identity.json"
HASH_PREFIX = "content of "
"""Prefix of the names of identity entries that are hashes."""
MAX_NAMED = 8
"""Maximum number of differing identity entries that an error message names."""


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write identity.json into a folder, whole or not at all.

    Args:
        identity: values that must be the same for the run to be resumed: name -> string, number, bool or None. The
            names of hashes begin with "content of ".
    """
    partial = _partial(folder)
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(identity, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / IDENTITY)


def no_run(folder: Path) -> BarberError:
    """The error for a folder that holds no run to resume."""
    return BarberError(f"--resume: no unfinished run under {folder}; leave --resume out to start one")


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raise `BarberError` unless the folder holds a run state with this identity."""
    path = folder / IDENTITY
    try:
        stored = documents.read(path)
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
    except (FileNotFoundError, NotADirectoryError):
        raise no_run(folder) from None
    except (OSError, ValueError) as error:
        cause = first_line(error)
        raise BarberError(f"--resume: {path}: cannot be read ({cause}); start over with --overwrite") from None
    given = documents.parse(json.dumps(identity))
    differing = [name for name in given | stored if given.get(name) != stored.get(name)]
    if not differing:
        return
    differences = [
        f"{name} differs from that of the run under {folder}"
        if name.startswith(HASH_PREFIX)
        else f"{name} was {stored.get(name)} in the run under {folder}, now {given.get(name)}"
        for name in differing[:MAX_NAMED]
    ]
    if len(differing) > MAX_NAMED:
        differences.append(f"and so on, {len(differing)} in all")
    raise BarberError(f"--resume: {'; '.join(differences)}; use the same or start over with --overwrite")


def first_line(error: Exception) -> str:
    """First line of an error's message, at most 200 characters."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def delete_run(folder: Path) -> None:
    """Delete a run state, identity.json last, so that after an interruption the folder is still known as one.

    Raises:
        BarberError: the folder holds something other than a run state.
    """
    if not folder.exists():
        return
    entries = set(folder.iterdir()) - {_partial(folder)}
    if entries and folder / IDENTITY not in entries:
        raise BarberError(f"{folder} exists but is not an unfinished run; move it or choose another --out")
    for path in entries - {folder / IDENTITY}:
        delete_tree(path)
    shutil.rmtree(folder)


def delete_tree(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _partial(folder: Path) -> Path:
    return folder / f"{IDENTITY}.partial"
