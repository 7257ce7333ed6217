"""Initialise `jax.distributed` for a run over several processes, from options or from the cluster's environment."""

import atexit
import contextlib
import importlib.util
import os
import sys

import jax

from barber_jax.console import interrupt, notes
from barber_jax.console.errors import BarberError

HEARTBEAT_S = 60
"""Seconds without a heartbeat after which a process counts as dead and the others stop with an error."""
SHUTDOWN_S = 24 * 3600
"""Seconds that finished processes wait at shutdown for the primary one, which still writes and evaluates. If it dies,
they stop waiting at once."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect this process to the others of a multi-process run; do nothing in a single-process run.

    Must be called before the first JAX computation.

    Args:
        coordinator: host:port of process 0; None to take it from the cluster (TPU pod, Slurm, Kubernetes, Open MPI).
        processes: number of processes.
        process: index of this process.

    Raises:
        BarberError: the other processes cannot be reached.
    """
    if coordinator is None and not in_cluster():
        return
    # On CPU, collectives between processes need gloo.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself: the run would not end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=SHUTDOWN_S
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is None and not _is_multi_process():
            return  # A TPU machine that is not part of a pod.
        cause = str(error).strip().split("\n")[0]
        where = coordinator or "the cluster's coordinator"
        raise BarberError(f"--coordinator: cannot join the other processes through {where} ({cause})") from error
    if jax.process_index():
        notes.silence()
    # After JAX's own, so that it is called before that one, which waits for the other processes.
    atexit.register(_leave_at_once_if_interrupted)


def _leave_at_once_if_interrupted() -> None:
    """End the process if a signal has ended its run: the other processes wait for it, and it must not wait for them."""
    if interrupt.received():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(interrupt.exit_status())


def in_cluster() -> bool:
    """Whether JAX may find other processes by itself: the environment names several, or there is a TPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return _is_multi_process() or ("tpu" in platforms and importlib.util.find_spec("libtpu") is not None)


def _is_multi_process() -> bool:
    """Whether environment variables of the cluster name several processes."""
    variables = os.environ
    return (
        ("SLURM_PROCID" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1)
        or ("KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables)
        or ("OMPI_MCA_orte_hnp_uri" in variables and int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1)
        or "," in variables.get("TPU_WORKER_HOSTNAMES", "")
        or "TPU_PROCESS_ADDRESSES" in variables
    )
