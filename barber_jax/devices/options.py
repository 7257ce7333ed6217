"""Options of what to compute on: devices, processes, precision, memory."""

import re
from dataclasses import dataclass
from typing import Literal

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup

ComputeDtype = Literal["float32", "bfloat16"]


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """`data=N,model=M`, either of them left out for 1 -> (N, M).

    Raises:
        BarberError: not of that form.
    """
    if text is None:
        return None
    parts = [re.fullmatch(r"(data|model)=([1-9][0-9]{0,5})", part) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if len(sizes) != len(parts):
        raise BarberError(f"--mesh {text!r} is not of the form data=N,model=M, such as data=4,model=2")
    return sizes.get("data", 1), sizes.get("model", 1)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(OptionGroup):
    """What to compute on, and in how much memory."""

    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products; statistics are always float32."""
    batch: int | None = None
    """Samples in a micro-batch: sets peak memory. Default 8; on CPU as many as make about 1024 tokens."""
    mesh: str | None = None
    """data=N,model=M: samples over N, linears over M devices. Default: one device."""
    offload_activations: bool = False
    """Keep activations in host memory, but for a micro-batch."""
    compilation_cache: str | None = None
    """Folder that keeps compiled programs, or off. Default: in the user's cache folder."""
    coordinator: str | None = None
    """host:port of process 0, where no cluster tells JAX of it."""
    processes: int | None = None
    """Number of processes (with --coordinator)."""
    process: int | None = None
    """Number of this process, from 0 (with --coordinator)."""

    def settle(self) -> None:
        self._require_least(1, "batch")
        parse_mesh(self.mesh)
        by_hand = (self.coordinator, self.processes, self.process)
        if all(option is None for option in by_hand):
            return
        if None in by_hand:
            raise BarberError("--coordinator, --processes and --process: give all three of them")
        if not re.fullmatch(r"\S+:[0-9]{1,5}", self.coordinator):
            raise BarberError(f"--coordinator {self.coordinator!r} is not host:port")
        if not 0 <= self.process < self.processes:
            raise BarberError(f"--process {self.process} is not one of the {self.processes} --processes, from 0 on")
