"""What every command line shares: options from a dataclass, errors on one line, exact float32 products.

JAX is imported where it is set up: apply_masks does without.
"""

import contextlib
import hashlib
import io
import os
import platform
import re
from pathlib import Path
from typing import TypeVar

import tyro

from barber_jax.console.errors import BarberError

Options = TypeVar("Options")


def parse(options: type[Options], program: str, arguments: list[str] | None = None) -> Options:
    """Options from the command line (None: sys.argv).

    Raises:
        BarberError: an option is unknown, missing or of the wrong type. tyro prints a box for that; scripts rely on
            one line.
        SystemExit: after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, prog=f"python -m {program}", args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BarberError(f"{_gist(said.getvalue()) or 'bad options'}; see python -m {program} --help") from None


def _gist(box: str) -> str:
    """What is wrong, from the box of text that tyro prints: its first paragraph, and the names it lists."""
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).strip().splitlines() or [""]
    # Frame and rules go; where the output's encoding has no lines to draw, rules are hyphens and there is no frame.
    lines = [re.sub(r"^-{3,}$", "", line.strip("│╭╮╰╯─ ")) for line in lines]
    first, _, rest = "\n".join(lines).strip().partition("\n\n")
    names = re.compile(r"^--[\w-]+", re.MULTILINE)
    if first.startswith("Missing from"):
        return "missing " + ", ".join(names.findall(first))
    meant = ", ".join(names.findall(rest)) if rest.startswith("Perhaps you meant") else ""
    return " ".join(first.split()).rstrip(".") + (f" (perhaps you meant {meant})" if meant else "") or title


def set_precision() -> None:
    """Let a float32 product be one: GPUs and TPUs round its inputs to fewer bits by default."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")


def set_compilation_cache(place: str | None) -> None:
    """Keep compiled programs on disk, so that a later run of the same shapes compiles nothing.

    Args:
        place: a folder, `off`, or None for JAX_COMPILATION_CACHE_DIR or else a folder in the user's cache.

    Raises:
        BarberError: the folder that was named cannot be written.
    """
    import jax

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
