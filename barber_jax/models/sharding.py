"""Sharding rules of a decoder block: over which mesh axis each array is spread.

Two axes. Samples are spread over `data`, linears over `model`: the linears that read a sub-block's input by their
outputs, those that read an intermediate activation by their inputs, so that a sub-block needs one all-reduce over
`model`. Everything else is replicated. Jitted functions state with `constrain` how their results are sharded and need
not know whether there is a mesh; without one, arrays lie on the default device and `constrain` does nothing.
"""

from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from barber_jax.models.decoder import SubBlock

DATA, MODEL = "data", "model"
"""The mesh axes."""


def constrain(value: jax.Array, *axes: str | None) -> jax.Array:
    """Say, inside a jitted function, over which mesh axis each axis of an array is spread (None or left out: none)."""
    if jax.sharding.get_abstract_mesh().empty:
        return value
    return lax.with_sharding_constraint(value, P(*axes))


def groups() -> int:
    """How many samples are computed side by side: the size of `data`."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(DATA, 1)


def kernel_axes(sub: SubBlock, path: str) -> tuple[str | None, str | None]:
    """Mesh axes of a kernel [in, out] of a sub-block."""
    return (None, MODEL) if sub.splits_outputs(path) else (MODEL, None)


def mask_axes(sub: SubBlock, path: str) -> tuple[str | None, str | None]:
    """Mesh axes of a kernel's mask [out, in]."""
    return kernel_axes(sub, path)[::-1]


def parameter_axes(sub_blocks: Sequence[SubBlock]) -> dict[str, tuple[str | None, ...]]:
    """Mesh axes of those parameters of a decoder block that are spread over some."""
    axes: dict[str, tuple[str | None, ...]] = {}
    for sub in sub_blocks:
        for path in sub.kernels:
            axes[path] = kernel_axes(sub, path)
            axes[path.replace(".kernel", ".bias")] = axes[path][1:]
    return axes
