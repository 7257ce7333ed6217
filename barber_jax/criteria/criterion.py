"""What the stream needs to know of a starting criterion."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from barber_jax.config import SparsityPattern


@dataclass(frozen=True)
class Criterion:
    """A starting criterion.

    Attributes:
        statistic: activations [S, L, I] that enter a linear -> what `start` needs of them, float32, summed over
            samples (the stream adds up micro-batches). None when the criterion looks at weights alone; then stream A
            is not carried.
        start: (weight float32 [O, I], statistic or None, number of samples, pattern) -> bool [O, I] mask, True =
            kept. Traced; number of samples and pattern are static.
    """

    statistic: Callable[[jax.Array], jax.Array] | None
    start: Callable[[jax.Array, jax.Array | None, int, SparsityPattern], jax.Array]
