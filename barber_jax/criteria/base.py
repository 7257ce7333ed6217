"""The criterion protocol: what the pruning loop needs to know of a starting criterion.

A criterion is one file of this folder that defines `CRITERION`, and one line of `CRITERIA`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from barber_jax.masks.pattern import SparsityPattern

Quota = tuple[int | jax.Array, ...]
"""How many weights a matrix loses, in each group that a criterion compares."""


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
        statistic: activations [S, L, I] that enter a linear -> statistic of them, float32, summed over samples
            (micro-batches are added up). None for a criterion that looks at weights alone; then no stream A is
            propagated.
        start: (kernel float32 [I, O], prepared statistic or None, number of samples, pattern, quota) -> bool [O, I]
            mask, True = kept, and the updated kernel float32 [I, O], or None where the criterion leaves weights alone.
            Traced; number of samples and pattern are static. How much to prune is the quota alone, which may differ
            from block to block while the program stays the same; it is empty for an N:M pattern.
        prepare: done once for all linears that read the same input, on the host: (statistic, number of samples,
            input's name, say) -> prepared statistic. None: the statistic as it is. `say` prints a line.
        quota: (shape [O, I], fraction to prune) -> quota, on the host in Python's floats, whose products float32 could
            round differently.
        granularity, alpha: of the rebuild that follows, where the user gives none: as published.
    """

    statistic: Callable[[jax.Array], jax.Array] | None
    start: Callable[[jax.Array, Any, int, SparsityPattern, Quota], tuple[jax.Array, jax.Array | None]]
    prepare: Callable[[jax.Array, int, str, Callable[[str], None]], Any] | None = None
    quota: Callable[[tuple[int, int], float], Quota] = of_each_output
    granularity: str = "output1"
    alpha: float = 0.01
