"""Wanda++'s regional gradient score: wanda's, with the gradient of the decoder block (Yang et al., arXiv 2503.04992).

The paper's other half, its regional optimizer, trains weights between prunings and is not here.
"""

import jax
import jax.numpy as jnp

from barber_jax.config import SparsityPattern
from barber_jax.criteria.criterion import Criterion, Quota
from barber_jax.criteria.wanda import norms, select, statistic

SCALE = 100.0
"""The paper's a: weight of the gradient beside the norm of the input."""


def loss(output: jax.Array) -> jax.Array:
    """||f(H_s)||, the L2 norm of the block's output for a sample: [L, D] -> float32 scalar."""
    return jnp.sqrt(jnp.sum(jnp.square(output.astype(jnp.float32))))


def start(
    kernel: jax.Array, prepared: tuple[jax.Array, jax.Array], samples: int, pattern: SparsityPattern, quota: Quota
) -> tuple[jax.Array, None]:
    """Score (a G_oi + ||X_i||) |W_oi|; prune as wanda does.

    Args:
        kernel: float32 [I, O].
        prepared: `statistic` summed over all samples, float32 [I]; gradient of `loss`, float32 [I, O].

    Returns:
        bool [O, I] mask, True = kept; no updated weights.
    """
    squares, gradient = prepared
    score = (SCALE * gradient.T + norms(squares, samples)) * jnp.abs(kernel.T)
    return select(score, pattern, quota), None


CRITERION = Criterion(statistic=statistic, start=start, loss=loss)
