"""Masks and surviving weights of a sub-block: what changes hands between stages."""

from functools import partial

import jax
import jax.numpy as jnp

from barber_jax.forward.passes import Parameters
from barber_jax.models.decoder import SubBlock
from barber_jax.models.sharding import constrain, mask_axes


@jax.jit
def surviving_weights(dense: Parameters, updated: Parameters, masks: dict[str, jax.Array]) -> Parameters:
    """Updated weights where a mask keeps them, dense ones where it prunes: those are what a weight regrows as.

    Args:
        dense, updated: path -> kernels [in, out] and other parameters.
        masks: kernel path -> bool [out, in]; a parameter without a mask is taken as updated.

    Returns:
        path -> parameter, for every path of `updated`.
    """

    def survivor(path: str) -> jax.Array:
        return jnp.where(masks[path].T, updated[path], dense[path]) if path in masks else updated[path]

    return {path: survivor(path) for path in updated}


@partial(jax.jit, static_argnames="sub")
def shard_masks(sub: SubBlock, masks: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Masks bool [out, in] of a sub-block, sharded as its kernels are."""
    return {path: constrain(masks[path], *mask_axes(sub, path)) for path in sub.kernels}


@partial(jax.jit, static_argnames="sub")
def count_regrown(sub: SubBlock, new: dict[str, jax.Array], old: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How many weights are pruned by the old masks and kept by the new ones: kernel path -> int32."""
    return {path: constrain(jnp.sum(new[path] & ~old[path], dtype=jnp.int32)) for path in sub.kernels}
