"""Wanda: weight times the norm of its input, compared within an output (Sun et al., arXiv 2306.11695, equation 1)."""

import jax
import jax.numpy as jnp

from barber_jax.criteria.base import Criterion, Quota
from barber_jax.masks import selection
from barber_jax.masks.pattern import SparsityPattern


def statistic(x: jax.Array) -> jax.Array:
    """Sum of squares of every input over samples and tokens: [S, L, I] -> float32 [I].

    Tokens are added pairwise. One running sum over thousands of tokens loses digits, and inputs of equal weight (a
    checkpoint that was quantised has many) are told apart by the last digits of these sums.
    """
    squares = jnp.square(x.astype(jnp.float32))
    while (length := squares.shape[1]) > 1:
        squares = jnp.pad(squares, ((0, 0), (0, length % 2), (0, 0)))
        squares = squares[:, 0::2] + squares[:, 1::2]
    return jnp.sum(squares[:, 0], axis=0)


def start(
    kernel: jax.Array, squares: jax.Array, samples: int, pattern: SparsityPattern, quota: Quota
) -> tuple[jax.Array, None]:
    """Score |W_oi| * ||X_i||, with ||X_i|| = sqrt(mean over samples of the sum over tokens of X_si^2).

    In every output prune the floor(p * I) lowest, or the lowest M-N of every group of M.

    Args:
        kernel: float32 [I, O].
        squares: float32 [I], `statistic` summed over all samples.

    Returns:
        bool [O, I] mask, True = kept; no updated weights.
    """
    score = jnp.abs(kernel.T) * jnp.sqrt(squares / samples)
    if pattern.structured:
        return selection.keep_n_of_m(score, pattern.keep, pattern.of), None
    return selection.keep_highest(score, quota[0], selection.AXES["output1"]), None


CRITERION = Criterion(statistic=statistic, start=start)
