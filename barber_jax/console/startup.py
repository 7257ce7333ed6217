"""How a command starts: from its first import on, whatever goes wrong ends in one line.

A command imports its libraries, which takes seconds, before `exit_with_one_line` is called. Meanwhile somebody may
press Ctrl-C, a library may be broken, and JAX may need more memory than there is: then it does not raise an exception,
it ends the process.
"""

import importlib.abc
import os
import signal
import subprocess
import sys

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError, exit_for

TRIED_BELOW = 16 * 2**30
"""Limit on the address space, in bytes, below which it is tried whether JAX starts."""

SPARE = 6 * 10**8
"""Bytes of it that must be left when JAX has started: a run that lacks memory later may be aborted by JAX, too."""

TRIAL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_AS)[1]))
import jax, flax.nnx, orbax.checkpoint
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))).block_until_ready()
"""


def is_command() -> bool:
    """Whether this package is being imported because Python was started with `-m barber_jax...`."""
    # Python puts "-m" there until it has found the module.
    if sys.argv[:1] != ["-m"]:
        return False
    return any(
        word.startswith("-mbarber_jax") or (word == "-m" and following.startswith("barber_jax"))
        for word, following in zip(sys.orig_argv, [*sys.orig_argv[1:], ""], strict=True)
    )


def prepare() -> None:
    """From now on report what nothing catches as `exit_with_one_line` does, and watch over JAX's start."""
    interrupt.install_handler()
    # Python honours a SystemExit that the hook raises.
    sys.excepthook = lambda kind, error, trace: exit_for(error)
    if _limit() is not None:
        sys.meta_path.insert(0, _BeforeJAX())


class _BeforeJAX(importlib.abc.MetaPathFinder):
    """Tries out whether JAX starts when it is about to be imported, and finds no module."""

    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            sys.meta_path.remove(self)
            check_memory()
        return None


def check_memory() -> None:
    """Start JAX in another process, if the address space is limited (ulimit -v) to less than JAX may need.

    How much it needs depends on its version and on the number of cores, and it dies of too little in many ways:
    killed by a signal, by a library that exits, or with any exception.

    Raises:
        BarberError: JAX does not start, or would leave less than `SPARE`.
    """
    limit = _limit()
    if limit is None or limit >= TRIED_BELOW:
        return
    # The CPU only: a GPU's memory is not meant, and would be allocated twice.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        status = subprocess.run(
            [sys.executable, "-c", TRIAL, str(max(limit - SPARE, 0))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        ).returncode
    except OSError:
        status = 1
    interrupt.check()
    if status:
        ended = f" ({signal.Signals(-status).name})" if -status in set(signal.Signals) else ""
        raise BarberError(
            f"JAX does not start{ended} where memory is limited to {limit / 1e9:.2f} GB; "
            "raise the limit (ulimit -v), to 4 GB at least"
        )


def _limit() -> int | None:
    """The limit on this process's address space in bytes; None where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
