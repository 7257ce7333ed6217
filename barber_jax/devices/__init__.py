"""Devices: the device mesh, multi-process runs, and JAX settings.

May import: console, models.

| module | what it holds |
|---|---|
| `peak` | measured rate of matrix products |
| `host_memory` | host memory that is available |
| `mesh` | `Devices`: arrays between host and devices; consistency between processes |
| `hosts`, `wire` | initialisation of a run over several processes; encoding of what they send each other |
| `options` | command-line options for devices, processes, precision and memory |
| `settings` | matmul precision, how weights are selected, and the compilation cache |
| `compiled` | entries of the compilation cache: written whole, replaced when damaged |
"""

from barber_jax.devices.mesh import Devices, is_primary
from barber_jax.devices.settings import prepare_jax, set_precision

__all__ = ["Devices", "is_primary", "prepare_jax", "set_precision"]
