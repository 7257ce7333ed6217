"""Low-rank updates under a mask: W = (W_sparse + B A) with its pruned weights at zero (LoRA, arXiv 2106.09685).

The update is rms(W) / sqrt(r) times the product of the two factors, rms(W) of the surviving weights, so that a learning
rate is relative to the matrix as it is for the weights themselves.
"""

import jax
import jax.numpy as jnp

from barber_jax.forward.passes import Parameters

FIRST, SECOND = ".lora_in", ".lora_out"
"""Suffixes of the factors' names: [..., in, r] and [..., r, out]."""


def begin(kernel: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factors of a stack of kernels [N, in, out] before the first step: standard normal [N, in, r], and zeros."""
    blocks, inputs, outputs = kernel.shape
    return jax.random.normal(key, (blocks, inputs, rank)), jnp.zeros((blocks, rank, outputs), jnp.float32)


def merge(parameters: Parameters, masks: Parameters) -> Parameters:
    """Replace kernels and their factors by the merged kernels; parameters without factors stay.

    Args:
        parameters: path -> [..., in, out] kernel, or another parameter, or a factor.
        masks: path -> bool [..., in, out] of every kernel that has factors, True = kept.
    """
    merged = {path: value for path, value in parameters.items() if not path.endswith((FIRST, SECOND))}
    for path, mask in masks.items():
        first, second = parameters.get(path + FIRST), parameters.get(path + SECOND)
        if first is None:
            continue
        kernel = parameters[path].astype(jnp.float32)
        scale = root_mean_square(kernel, mask) / jnp.sqrt(first.shape[-1])
        merged[path] = jnp.where(mask, kernel + scale * (first @ second), 0.0)
    return merged


def root_mean_square(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Root mean square over the last two axes, of the kept values where there is a mask; the axes stay, of size 1."""
    kept = jnp.ones_like(values, bool) if mask is None else mask
    over = tuple(range(max(0, values.ndim - 2), values.ndim))
    squares = jnp.sum(jnp.where(kept, jnp.square(values), 0.0), axis=over, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(jnp.sum(kept, axis=over, keepdims=True), 1))
