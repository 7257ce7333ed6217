"""Command-line options for devices, processes, precision and memory."""

import re
from dataclasses import dataclass
from typing import Literal

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup

PROCESS_OPTIONS = ("coordinator", "processes", "process", "public_coordinator")
"""Options for one process of several, which concern machines and not results."""
ComputeDtype = Literal["float32", "bfloat16"]
MatmulPrecision = Literal["highest", "high", "default"]
SelectionOption = Literal["auto", "top_k", "count"]


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """Parse `data=N,model=M`, in which either part may be left out (size 1), into (N, M).

    Raises:
        BarberError: the text is not of this form.
    """
    if text is None:
        return None
    parts = [re.fullmatch(r"(data|model)=([1-9][0-9]{0,5})", part) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if len(sizes) != len(parts):
        raise BarberError(f"--mesh {text!r} is not of the form data=N,model=M, such as data=4,model=2")
    return sizes.get("data", 1), sizes.get("model", 1)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(OptionGroup):
    """Devices, processes and precision."""

    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products; statistics are always float32."""
    matmul_precision: MatmulPrecision = "highest"
    """Float32 matrix products: highest = full float32; high, default = the device's faster ones, such as TF32."""
    mesh: str | None = None
    """data=N,model=M: shard samples over N and linears over M devices. Default: one device."""
    compilation_cache: str | None = None
    """Folder for compiled programs, or off. Default: a folder in the user's cache."""
    coordinator: str | None = None
    """host:port of process 0. Only needed where JAX cannot find it through the cluster."""
    processes: int | None = None
    """Number of processes (with --coordinator)."""
    process: int | None = None
    """Index of this process, from 0 (with --coordinator)."""
    public_coordinator: bool = False
    """Allow --coordinator at a public address. Whoever reaches its port can read and change the run."""

    def settle(self) -> None:
        parse_mesh(self.mesh)
        given = (self.coordinator, self.processes, self.process)
        if all(option is None for option in given):
            if self.public_coordinator:
                raise BarberError("--public-coordinator needs --coordinator")
            return
        if None in given:
            raise BarberError("--coordinator, --processes and --process: give all three of them")
        if not re.fullmatch(r"\S+:[0-9]{1,5}", self.coordinator):
            raise BarberError(f"--coordinator {self.coordinator!r} is not host:port")
        if not 1 <= int(self.coordinator.rpartition(":")[2]) <= 65535:
            raise BarberError(f"--coordinator {self.coordinator}: a port is a number from 1 to 65535")
        if not 0 <= self.process < self.processes:
            raise BarberError(f"--process {self.process} must be at least 0 and below --processes {self.processes}")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(ComputeOptions):
    """Devices, processes, precision and memory."""

    selection: SelectionOption = "auto"
    """How weights are selected, with the same result: top_k = jax.lax.top_k, count = bisection, auto = by device."""
    batch: int | None = None
    """Samples in a micro-batch; determines peak memory. Default 8; on CPU 1024 / --length, between 1 and 8."""
    offload_activations: bool = False
    """Keep activations in host memory, with one micro-batch at a time on the device."""

    def settle(self) -> None:
        ComputeOptions.settle(self)
        self._require_least(1, "batch")
