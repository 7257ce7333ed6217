"""Magnitude pruning: the smallest weights go (Han et al., arXiv 1506.02626)."""

import jax
import jax.numpy as jnp

from barber_jax import masks
from barber_jax.config import SparsityPattern
from barber_jax.criteria.criterion import Criterion


def start(weight: jax.Array, statistic: None, samples: int, pattern: SparsityPattern) -> jax.Array:
    """Prune the floor(p * O * I) weights of a matrix with the lowest |W|, or the lowest M-N of every group of M.

    Args:
        weight: float32 [O, I].

    Returns:
        bool [O, I], True = kept.
    """
    score = jnp.abs(weight)
    if pattern.structured:
        return masks.keep_n_of_m(score, pattern.keep, pattern.of)
    return masks.keep_highest(score, int(weight.size * pattern.sparsity), masks.AXES["layer"])


CRITERION = Criterion(statistic=None, start=start)
