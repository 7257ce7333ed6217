"""Wanda: score |weight| times the norm of its input, compared per output (Sun et al., arXiv 2306.11695, equation 1)."""

import jax
import jax.numpy as jnp

from barber_jax.criteria.base import Criterion, Quota
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selection import AXES
from barber_jax.masks.selector import Selector


def statistic(x: jax.Array) -> jax.Array:
    """Sum of squares of each input over samples and tokens: [S, L, I] -> float32 [I].

    Tokens are summed pairwise: a running sum over thousands of tokens loses precision, and the last digits of these
    sums decide between weights of equal magnitude, of which a checkpoint that was quantised has many.
    """
    squares = jnp.square(x.astype(jnp.float32))
    while (length := squares.shape[1]) > 1:
        squares = jnp.pad(squares, ((0, 0), (0, length % 2), (0, 0)))
        squares = squares[:, 0::2] + squares[:, 1::2]
    return jnp.sum(squares[:, 0], axis=0)


def start(
    kernel: jax.Array, squares: jax.Array, samples: int, pattern: SparsityPattern, quota: Quota, select: Selector
) -> tuple[jax.Array, None]:
    """Prune the weights with the lowest score |W_oi| * ||X_i||.

    ||X_i|| = sqrt(mean over samples of the sum over tokens of X_si^2). In each output the floor(p * I) lowest are
    pruned, or the lowest M-N of every M inputs.

    Args:
        kernel: float32 [I, O].
        squares: float32 [I], `statistic` summed over all samples.
        samples: number of samples.
        quota: one number, from `quota_per_output`.
        select: of the matrix.

    Returns:
        bool [O, I] mask, True = kept; no updated weights.
    """
    score = jnp.abs(kernel.T) * jnp.sqrt(squares / samples)
    if pattern.structured:
        return select.keep_n_of_m(score, pattern.keep, pattern.of), None
    return select.keep_highest(score, quota[0], AXES["output1"]), None


CRITERION = Criterion(statistic=statistic, start=start)
