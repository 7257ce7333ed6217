"""Several processes as one computation: `jax.distributed`, by hand or as the cluster says."""

import importlib.util
import os

import jax

from barber_jax.console.errors import BarberError

HEARTBEAT_S = 60
"""A process that is silent for so long is taken for dead, and the others stop with an error."""
SHUTDOWN_S = 24 * 3600
"""How long the others wait, when they are done, for the primary process to write and evaluate; its death ends the
wait at once."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Make this process one of many, if it is. Must come before anything is computed.

    Args:
        coordinator: host:port of process 0; None: ask the cluster (TPU pod, Slurm, Kubernetes, Open MPI).
        processes, process: their number, and which one this is.

    Raises:
        BarberError: the others cannot be reached.
    """
    if coordinator is None and not in_cluster():
        return
    # Without it the processes of a CPU computation cannot send each other anything.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=SHUTDOWN_S
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is None and not _several():
            return  # a single TPU machine
        cause = str(error).strip().split("\n")[0]
        where = coordinator or "the cluster's coordinator"
        raise BarberError(f"--coordinator: cannot join the other processes through {where} ({cause})") from error


def in_cluster() -> bool:
    """Whether JAX may be able to find other processes by itself."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return _several() or ("tpu" in platforms and importlib.util.find_spec("libtpu") is not None)


def _several() -> bool:
    """Whether the environment says that there are several processes."""
    said = os.environ
    return (
        ("SLURM_PROCID" in said and int(said.get("SLURM_NTASKS", 1)) > 1)
        or ("KUBERNETES_SERVICE_HOST" in said and "JOB_COMPLETION_INDEX" in said)
        or ("OMPI_MCA_orte_hnp_uri" in said and int(said.get("OMPI_COMM_WORLD_SIZE", 1)) > 1)
        or "," in said.get("TPU_WORKER_HOSTNAMES", "")
        or "TPU_PROCESS_ADDRESSES" in said
    )
