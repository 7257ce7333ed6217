"""Causes of exceptions that are no `BarberError`: those that a user can act upon, and a log file for all others."""

import contextlib
import errno
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator

from barber_jax.console.errors import one_line

MEMORY = (
    "raise the limit on memory (ulimit -v, the container's), or need less: a smaller --batch, fewer or shorter samples"
)

DEVICE_MEMORY = (
    "need less of the device's memory: a smaller --batch, --offload-activations, or --mesh over more devices; "
    "on a CPU raise the limit on memory, or fewer or shorter samples"
)

_JAX_SETTING = re.compile(r"(?:for JAX flag|for environment) '?(jax_\w+)", re.IGNORECASE)
"""How JAX, on import, names one of its settings that the environment gives a value that it cannot have."""
_NO_MEMORY = ("Cannot allocate memory", "failed to map segment", "cannot allocate memory")
"""What the system says of a lack of memory where a library is loaded, or a file mapped."""


def explain(error: BaseException) -> str | None:
    """The message for an exception whose cause lies outside the program, with the way out; None for any other."""
    text = str(error)
    if isinstance(error, MemoryError) or "std::bad_alloc" in text:
        return f"out of memory{_place(error)}{f' ({text})' if text else ''}; {MEMORY}"
    if isinstance(error, ImportError | OSError) and any(sign in text for sign in _NO_MEMORY):
        return f"out of memory ({_first_line(text)}); {MEMORY}"
    if text.startswith("RESOURCE_EXHAUSTED") or "Out of memory" in text:
        return f"out of memory{_place(error)} ({_first_line(text)}); {DEVICE_MEMORY}"
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return f"the system starts no more threads, for lack of memory or by its limits (ulimit -u); {MEMORY}"
    if isinstance(error, RuntimeError) and text.startswith(("Unable to initialize backend", "Unknown backend")):
        given = os.environ.get("JAX_PLATFORMS")
        cause = _first_line(text).partition(" (set JAX_PLATFORMS")[0]
        where = f"JAX_PLATFORMS={given}" if given else "JAX"
        return f"{where}: {cause}; set JAX_PLATFORMS to a platform that is installed here, such as cpu"
    if isinstance(error, ValueError) and (setting := _JAX_SETTING.search(text)):
        name = setting[1].upper()
        return f"{_first_line(text)}; correct the environment variable {name}, or unset it"
    if is_panic(error):
        return f"the tokenizers library failed ({text}); the tokenizer's files are damaged: fetch them again"
    if isinstance(error, Warning) and sys.warnoptions:
        what = f"{type(error).__name__}: {_first_line(text)}"
        return f"a warning was made an error by PYTHONWARNINGS or python -W ({what}); unset it, or use 'default' there"
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{error.strerror}{f' ({_shown(error)})' if error.filename else ''}; raise the limit (ulimit -n)"
        if error.errno == errno.ENOENT and error.filename is None:
            if "temporary directory" in text:
                return "there is no folder for temporary files that can be written; set TMPDIR to one"
            if _no_current_folder():
                return "the current folder was deleted; change to one that exists"
        # With a file name it is a path that the system refuses: too long, not permitted, or deleted meanwhile.
        if error.filename is not None:
            return f"{_shown(error)}: {error.strerror}; fix this path or give another path"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.strerror}; free some space, or write to another place"
    return None


def _place(error: BaseException) -> str:
    """Where a run was, as its stopwatch has noted (`progress.Stopwatch`): ` at block 3, mlp gradient`."""
    return "".join(f" at {note}" for note in getattr(error, "__notes__", [])[:1])


def _shown(error: OSError) -> str:
    """The file that an error names."""
    name = error.filename
    return os.fsdecode(name if isinstance(name, str | bytes) else str(name))


def _no_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a library written in Rust, such as tokenizers. It is not an `Exception`."""
    return type(error).__name__ == "PanicException"


def is_foreign(error: BaseException) -> bool:
    """Whether an exception that a library raised may be taken for a complaint about what it was given to read.

    Not one that ends the process, nor lack of memory, which is nobody's file's fault.
    """
    return (isinstance(error, Exception) and not isinstance(error, MemoryError)) or is_panic(error)


def unexpected(error: BaseException) -> str:
    """Write an exception with its traceback to a new log file, and return the message that points to it."""
    what = f"{type(error).__name__}: {_first_line(str(error))}" if str(error) else type(error).__name__
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{shlex.join(sys.argv)}\nPython {platform.python_version()}\n"
    try:
        handle, log = tempfile.mkstemp(prefix="barber_jax-", suffix=".log")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{head}{_packages()}\n" + "".join(traceback.format_exception(error)))
    except OSError as failed:
        return f"unexpected {what}; its traceback could not be saved ({failed.strerror}): set TMPDIR and try again"
    return f"unexpected {what}; this is a fault of barber_jax: please report it with the traceback in {log}"


def _packages() -> str:
    names = ("barber_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


@contextlib.contextmanager
def held_warnings() -> Iterator[None]:
    """Context manager that holds Python warnings back; after a success they are shown, one line each, once."""
    if sys.warnoptions:
        # The user has asked for warnings (python -W): as they come.
        yield
        return
    held: dict[str, None] = {}

    def hold(message, category, filename, lineno, file=None, line=None) -> None:
        held[f"{category.__name__}: {message} ({filename}:{lineno})"] = None

    shown, warnings.showwarning = warnings.showwarning, hold
    try:
        yield
    finally:
        warnings.showwarning = shown
    for each in held:
        print("warning: " + one_line(each), file=sys.stderr)
