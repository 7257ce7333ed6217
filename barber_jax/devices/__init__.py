"""Devices: the mesh that a computation runs on, several processes, and JAX's settings.

May import: console, models.

| module | what it holds |
|---|---|
| `mesh` | `Devices`, arrays between host and devices, agreement between processes |
| `hosts` | joining several processes |
| `options` | the options of a command that say what to compute on |
| `settings` | precision, and where compiled programs are kept |
"""

from barber_jax.devices.mesh import Devices, is_primary
from barber_jax.devices.settings import set_compilation_cache, set_precision

__all__ = ["Devices", "is_primary", "set_compilation_cache", "set_precision"]
