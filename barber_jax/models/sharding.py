"""Sharding rules of a decoder block: the mesh axis over which each array is sharded.

The mesh has two axes. Samples are sharded over `data`, linears over `model`: linears that read a sub-block's input by
their outputs, linears that read an intermediate activation by their inputs, so that a sub-block needs one all-reduce
over `model`. Everything else is replicated. Jitted functions declare the sharding of their results with `constrain`, so
they work with and without a mesh; without one, arrays are on the default device and `constrain` does nothing.
"""

from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from barber_jax.models.decoder import SubBlock

DATA, MODEL = "data", "model"
"""The mesh axes."""


def constrain(value: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an array in a jitted function: mesh axis of each array axis (None or omitted: none)."""
    if jax.sharding.get_abstract_mesh().empty:
        return value
    return lax.with_sharding_constraint(value, P(*axes))


def data_axis_size() -> int:
    """Size of the mesh axis `data`, that is, how many samples are computed in parallel; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(DATA, 1)


def model_axis_size() -> int:
    """Size of the mesh axis `model`, over which linears are sharded; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(MODEL, 1)


def sharded_axes(axes: Sequence[str | None]) -> tuple[int, ...]:
    """Axes of an array that are spread over several devices, given the mesh axis of each of them."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return tuple(axis for axis, name in enumerate(axes) if sizes.get(name, 1) > 1)


def kernel_axes(sub: SubBlock, path: str) -> tuple[str | None, str | None]:
    """Mesh axes of a sub-block's kernel [in, out]."""
    return (None, MODEL) if sub.splits_outputs(path) else (MODEL, None)


def mask_axes(sub: SubBlock, path: str) -> tuple[str | None, str | None]:
    """Mesh axes of a kernel's mask [out, in]."""
    return kernel_axes(sub, path)[::-1]


def parameter_axes(sub_blocks: Sequence[SubBlock]) -> dict[str, tuple[str | None, ...]]:
    """Mesh axes of the parameters of a decoder block that are sharded; all others are replicated."""
    axes: dict[str, tuple[str | None, ...]] = {}
    for sub in sub_blocks:
        for path in sub.kernels:
            axes[path] = kernel_axes(sub, path)
            axes[path.replace(".kernel", ".bias")] = axes[path][1:]
    return axes
