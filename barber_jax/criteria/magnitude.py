"""Magnitude pruning: the smallest weights go (Han et al., arXiv 1506.02626)."""

import jax
import jax.numpy as jnp

from barber_jax.criteria.base import Criterion, Quota, of_the_matrix
from barber_jax.masks import selection
from barber_jax.masks.pattern import SparsityPattern


def start(
    kernel: jax.Array, statistic: None, samples: int, pattern: SparsityPattern, quota: Quota
) -> tuple[jax.Array, None]:
    """Prune the floor(p * O * I) weights of a matrix with the lowest |W|, or the lowest M-N of every group of M.

    Args:
        kernel: float32 [I, O].

    Returns:
        bool [O, I] mask, True = kept; no updated weights.
    """
    score = jnp.abs(kernel.T)
    if pattern.structured:
        return selection.keep_n_of_m(score, pattern.keep, pattern.of), None
    return selection.keep_highest(score, quota[0], selection.AXES["layer"]), None


CRITERION = Criterion(statistic=None, start=start, quota=of_the_matrix, granularity="block", alpha=0.1)
