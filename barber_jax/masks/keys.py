"""Integer keys of scores: non-negative float32 as int32 of the same order, with which weights are selected exactly."""

import jax
import jax.numpy as jnp
from jax import lax

INFINITY_KEY = 0x7F800000
"""Key of infinity, above the key of every finite score."""
EXCLUDED_KEY = jnp.iinfo(jnp.int32).max
"""Key above that of every score, for entries that must not be selected."""


def to_keys(scores: jax.Array) -> jax.Array:
    """Map non-negative float32 to int32 keys of the same order. abs() clears the sign bit of -0.0."""
    return lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)


def restrict(keys: jax.Array, flags: jax.Array) -> jax.Array:
    """Replace the keys of entries that are not flagged with EXCLUDED_KEY."""
    return jnp.where(flags, keys, EXCLUDED_KEY)


def swaps_of_outliers(outliers: jax.Array, alpha: jax.Array) -> jax.Array:
    """Number of swaps for a number R of outlier pairs, int32: floor(float32(R) * float32(alpha))."""
    swaps = jnp.floor(outliers.astype(jnp.float32) * jnp.float32(alpha)).astype(jnp.int32)
    # float32(R) may round up to more than R when R > 2^24.
    return jnp.minimum(swaps, outliers)
