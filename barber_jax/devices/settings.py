"""Settings of JAX that every command makes first: exact float32 products, and where compiled programs are kept."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from barber_jax.console.errors import BarberError


def set_precision() -> None:
    """Let a float32 product be one: GPUs and TPUs round its inputs to fewer bits by default."""
    jax.config.update("jax_default_matmul_precision", "highest")


def set_compilation_cache(place: str | None) -> None:
    """Keep compiled programs on disk, so that a later run of the same shapes compiles nothing.

    Args:
        place: a folder, `off`, or None for JAX_COMPILATION_CACHE_DIR or else a folder in the user's cache.

    Raises:
        BarberError: the folder that was named cannot be written.
    """
    if place == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    given = place or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    # JAX does not tell the programs of one CPU from those of another; a home folder may be seen by both.
    folder = Path(given).expanduser() if given else home / "barber_jax" / "compiled" / _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        if place:
            raise BarberError(f"--compilation-cache {place}: cannot be written; name another folder, or 'off'")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Everything, small programs too: a run has few, and uses each of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _cpu() -> str:
    """A name for this machine's kind of CPU: what programs for it may use."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind += next(line for line in lines if line.lower().startswith(("flags", "features")))
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
