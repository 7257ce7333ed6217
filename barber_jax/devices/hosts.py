"""Initialise `jax.distributed` for a run over several processes, from options or from the cluster's environment."""

import atexit
import contextlib
import importlib.util
import ipaddress
import os
import socket
import sys

import jax

from barber_jax.console import interrupt, notes
from barber_jax.console.errors import BarberError

HEARTBEAT_S = 60
"""Seconds without a heartbeat after which a process counts as dead and the others stop with an error."""
SHUTDOWN_S = 24 * 3600
"""Seconds that finished processes wait at shutdown for the primary one, which still writes and evaluates. If it dies,
they stop waiting at once."""


BIND = "JAX_COORDINATOR_BIND_ADDRESS"
"""Environment variable with the address to listen at, where it is not the one that the others connect to."""


def join(coordinator: str | None, processes: int | None, process: int | None, public_coordinator: bool = False) -> None:
    """Connect this process to the others of a multi-process run; do nothing in a single-process run.

    Must be called before the first JAX computation.

    Args:
        coordinator: host:port of process 0; None to take it from the cluster (TPU pod, Slurm, Kubernetes, Open MPI).
        processes: number of processes.
        process: index of this process.
        public_coordinator: allow a coordinator at a public address.

    Raises:
        BarberError: the other processes cannot be reached, or could be by anybody.
    """
    if coordinator is None and not in_cluster():
        return
    options = {}
    if coordinator is not None:
        # By default JAX listens on every interface, and asks nobody who connects for a password.
        bind = (os.environ.get(BIND) or coordinator) if process == 0 else coordinator
        check_address(coordinator, public_coordinator, listens=process == 0 and bind == coordinator)
        if bind != coordinator:
            check_address(bind, public_coordinator)
        options["coordinator_bind_address"] = bind
    # On CPU, collectives between processes need gloo.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself: the run would not end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
            **options,
        )
    except Exception as error:
        # JAX reads many variables of a cluster, and raises KeyError and others for what is missing or odd there.
        if coordinator is None and not _is_multi_process():
            return  # A TPU machine that is not part of a pod.
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
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


def check_address(coordinator: str, public: bool, listens: bool = False) -> None:
    """Check the address host:port of a coordinator that was started by hand.

    Args:
        public: whether a public address is allowed.
        listens: whether this process will listen there.

    Raises:
        BarberError: the host is unknown, or has a public address and `public` is not set, or this process would listen
            where no other machine reaches it, although the host is not a loopback address by name.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise BarberError(f"--coordinator {coordinator}: cannot find this host ({cause}); give its address") from None
    addresses = [ipaddress.ip_address(each.partition("%")[0]) for each in sorted(found)]
    open_to_all = [each for each in addresses if is_public(each)]
    if open_to_all and not public:
        what = (
            "every interface of this machine"
            if open_to_all[0].is_unspecified
            else f"the public address {open_to_all[0]}"
        )
        raise BarberError(
            f"--coordinator {coordinator} is {what}: whoever reaches that port can read and change the run, without a "
            "password; give a private address, or --public-coordinator if a firewall lets nobody else in"
        )
    if listens and all(each.is_loopback for each in addresses) and not _names_loopback(host):
        raise BarberError(
            f"--coordinator {coordinator}: on this machine the name stands for {addresses[0]}, where other machines do "
            "not reach it; give its address in the network, or 127.0.0.1 if all processes are on this machine"
        )


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether strangers may reach an address: it is not private, loopback or link-local, or it is every interface."""
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_unspecified:
        return True
    return not (address.is_private or address.is_loopback or address.is_link_local)


def _names_loopback(host: str) -> bool:
    """Whether a host is a loopback address by its name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower().endswith("localhost")


def in_cluster() -> bool:
    """Whether JAX may find other processes by itself: the environment names several, or there is a TPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return _is_multi_process() or ("tpu" in platforms and importlib.util.find_spec("libtpu") is not None)


def _count(variable: str) -> int:
    """The number of processes in an environment variable, 1 where it is not set."""
    given = os.environ.get(variable, "1")
    if not given.isdecimal():
        raise BarberError(f"{variable}={given} in the environment is no number of processes; correct or unset it")
    return int(given)


def _is_multi_process() -> bool:
    """Whether environment variables of the cluster name several processes."""
    variables = os.environ
    return (
        ("SLURM_PROCID" in variables and _count("SLURM_NTASKS") > 1)
        or ("KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables)
        or ("OMPI_MCA_orte_hnp_uri" in variables and _count("OMPI_COMM_WORLD_SIZE") > 1)
        or "," in variables.get("TPU_WORKER_HOSTNAMES", "")
        or "TPU_PROCESS_ADDRESSES" in variables
    )
