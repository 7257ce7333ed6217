"""What a command settles before it computes: determinism on GPUs, float32 matmul precision, selection, the compilation
cache."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Literal

import jax

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.devices.compiled import keep_entries_whole
from barber_jax.devices.options import MatmulPrecision, SelectionOption


def prepare_jax(compilation_cache: str | None = None, precision: MatmulPrecision = "highest") -> None:
    """Make all settings of this module; for commands, before anything is computed.

    Args:
        compilation_cache: see `set_compilation_cache`.
        precision: see `set_precision`.

    Raises:
        BarberError: as `set_compilation_cache`.
    """
    set_gpu_determinism()
    for name, value in RESULTS_DEPEND_ON.items():
        # A version of JAX may lack one of them.
        if hasattr(jax.config, name):
            jax.config.update(name, value)
    set_precision(precision)
    set_compilation_cache(compilation_cache)


RESULTS_DEPEND_ON = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_legacy_prng_key": "allow",
    "jax_transfer_guard": "allow",
    "jax_disable_jit": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
}
"""Settings of JAX under which the same command would give something else, fail, or take a hundred times as long: a
user's JAX_ENABLE_X64, meant for another program, changes nothing."""
GPU_FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm=false")
"""Flags of XLA. By default it times several kernels for every matrix product and takes the fastest: compiling takes
long, and two runs may choose, and so round, differently. With cuBLAS alone there is nothing to choose."""


def set_gpu_determinism() -> None:
    """Where JAX can use a GPU, ask XLA for programs that give the same in every run. A flag that XLA_FLAGS already
    holds stays as it is. Without effect once JAX has used a device."""
    plugins = importlib.metadata.entry_points(group="jax_plugins").names
    if any("cuda" in name or "rocm" in name for name in plugins):
        given = os.environ.get("XLA_FLAGS", "")
        missing = [flag for flag in GPU_FLAGS if flag.partition("=")[0] not in given]
        os.environ["XLA_FLAGS"] = " ".join([*missing, given]).strip()


def set_precision(precision: MatmulPrecision = "highest") -> None:
    """Set the precision of float32 matrix products; JAX's own default rounds their inputs on GPUs and TPUs."""
    jax.config.update("jax_default_matmul_precision", precision)


def choose_selection(option: SelectionOption, platform: str) -> Literal["top_k", "count"]:
    """Implementation of `masks.selection` for a platform (cpu, gpu, tpu) and the value of --selection.

    `auto` is what is faster in figures measured on the platform (docs/results.md): counting is on a CPU and on a GPU,
    where top_k is a little faster in one case of six. There are none of a TPU yet.
    """
    fastest: dict[str, Literal["top_k", "count"]] = {"cpu": "count", "gpu": "count", "tpu": "count"}
    return fastest.get(platform, "count") if option == "auto" else option


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
    given = place or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        # JAX's cache key does not distinguish CPU models, and machines with different CPUs may share a home folder.
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "barber_jax" / "compiled" / _cpu_digest()
        # In a container there may be no home folder.
        folder = expand(given or default)
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, BarberError):
        writable = False
    if not writable:
        if place:
            raise BarberError(f"--compilation-cache {place}: cannot be written; give another folder, or 'off'")
        # JAX itself reads JAX_COMPILATION_CACHE_DIR, and would warn at every program.
        jax.config.update("jax_compilation_cache_dir", None)
        return
    keep_entries_whole()
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
