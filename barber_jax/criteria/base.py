"""What the stream needs to know of a starting criterion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from barber_jax.config import SparsityPattern

Quota = tuple[int | jax.Array, ...]
"""How many weights a matrix loses, as a criterion counts them."""


def of_each_output(shape: tuple[int, int], sparsity: float) -> Quota:
    """floor(p * I), for a criterion that compares the weights of one output: [O, I] and p -> quota."""
    return (int(shape[1] * sparsity),)


def of_the_matrix(shape: tuple[int, int], sparsity: float) -> Quota:
    """floor(p * O * I), for a criterion that compares the weights of a whole matrix: [O, I] and p -> quota."""
    return (int(shape[0] * shape[1] * sparsity),)


@dataclass(frozen=True)
class Criterion:
    """A starting criterion.

    Attributes:
        statistic: activations [S, L, I] that enter a linear -> what the criterion needs of them, float32, summed over
            samples (the stream adds up micro-batches). None when it looks at weights alone; then no stream A is
            carried.
        start: (kernel float32 [I, O], prepared statistic or None, number of samples, pattern, quota) -> bool [O, I]
            mask, True = kept, and the updated kernel float32 [I, O], or None where the criterion leaves weights alone.
            Traced; number of samples and pattern are static. How much to prune is the quota alone, which may be
            another in every block while the program stays the same; it is empty for an N:M pattern, which says it.
        prepare: what is done once for all linears that read the same input, on the host: (statistic, number of
            samples, input's name, say) -> prepared statistic. None: the statistic as it is. `say` prints a line.
        quota: (shape [O, I], fraction to prune) -> quota, on the host in Python's floats, which float32 could not
            round the same way.
    """

    statistic: Callable[[jax.Array], jax.Array] | None
    start: Callable[[jax.Array, Any, int, SparsityPattern, Quota], tuple[jax.Array, jax.Array | None]]
    prepare: Callable[[jax.Array, int, str, Callable[[str], None]], Any] | None = None
    quota: Callable[[tuple[int, int], float], Quota] = of_each_output
