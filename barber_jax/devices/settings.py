"""JAX settings that a command makes before it computes: float32 matmul precision and the compilation cache."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from barber_jax.console.errors import BarberError


def set_precision() -> None:
    """Make float32 matmuls use full float32 precision: by default GPUs and TPUs round their inputs to fewer bits."""
    jax.config.update("jax_default_matmul_precision", "highest")


def set_compilation_cache(place: str | None) -> None:
    """Keep compiled programs on disk, so that a later run with the same shapes does not compile them again.

    Args:
        place: a folder, `off`, or None for JAX_COMPILATION_CACHE_DIR or else a folder in the user's cache.

    Raises:
        BarberError: the given folder is not writable. (A default folder that is not writable is not used.)
    """
    if place == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    given = place or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    # JAX's cache key does not distinguish CPU models, and machines with different CPUs may share a home folder.
    folder = Path(given).expanduser() if given else home / "barber_jax" / "compiled" / _cpu_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        if place:
            raise BarberError(f"--compilation-cache {place}: cannot be written; give another folder, or 'off'")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX skips small and quickly compiled programs; a run has few programs and needs all of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _cpu_digest() -> str:
    """Hash of this machine's CPU architecture and instruction-set extensions, 16 hexadecimal digits."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind += next(line for line in lines if line.lower().startswith(("flags", "features")))
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
