"""Magnitude pruning: prune the weights with the smallest absolute value (Han et al., arXiv 1506.02626)."""

import jax
import jax.numpy as jnp

from barber_jax.criteria.base import Criterion, Quota, quota_per_matrix
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selection import AXES
from barber_jax.masks.selector import Selector


def start(
    kernel: jax.Array, statistic: None, samples: int, pattern: SparsityPattern, quota: Quota, select: Selector
) -> tuple[jax.Array, None]:
    """Prune the floor(p * O * I) weights of a matrix with the lowest |W|, or the lowest M-N of every M inputs.

    Args:
        kernel: float32 [I, O].
        statistic, samples: not used.
        quota: one number, from `quota_per_matrix`.
        select: of the matrix.

    Returns:
        bool [O, I] mask, True = kept; no updated weights.
    """
    score = jnp.abs(kernel.T)
    if pattern.structured:
        return select.keep_n_of_m(score, pattern.keep, pattern.of), None
    return select.keep_highest(score, quota[0], AXES["layer"]), None


CRITERION = Criterion(statistic=None, start=start, quota=quota_per_matrix, granularity="block", alpha=0.1)
