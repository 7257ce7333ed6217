"""The criterion protocol: the functions and defaults that define a starting criterion.

A criterion is one file of this folder that defines `CRITERION`, and one line of `CRITERIA`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from barber_jax.forward.cotangents import Norm
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selector import Selector

Quota = tuple[int | jax.Array, ...]
"""How many weights to prune in each comparison group of a matrix: one number for each kind of group."""


def quota_per_output(shape: tuple[int, int], sparsity: float) -> Quota:
    """Quota floor(p * I) of a criterion whose comparison group is one output, for shape [O, I] and sparsity p."""
    return (int(shape[1] * sparsity),)


def quota_per_matrix(shape: tuple[int, int], sparsity: float) -> Quota:
    """Quota floor(p * O * I) of a criterion whose comparison group is the matrix, for shape [O, I] and sparsity p."""
    return (int(shape[0] * shape[1] * sparsity),)


@dataclass(frozen=True)
class Criterion:
    """A starting criterion.

    Attributes:
        statistic: function of a linear's input [S, L, I] that returns a float32 array summed over the S samples;
            the results of all micro-batches are added. None for a criterion that uses the weights alone; then stream A
            is not computed.
        start: (kernel float32 [I, O], prepared statistic or None, number of samples, pattern, quota, selector) ->
            bool [O, I] mask, True = kept, and the updated kernel float32 [I, O], or None if the criterion does not
            update weights. It is traced; number of samples, pattern and selector are static. It must take the number
            of weights to prune from the quota, a traced value that may differ between blocks without recompilation.
            For an N:M pattern the quota is empty. The selector selects weights by score in groups.
        prepare: (statistic, number of samples, name of the input, say) -> prepared statistic. Called on the host, once
            for all linears that read the same input; `say` prints a line. None to use the statistic unchanged.
        quota: (shape [O, I], fraction to prune) -> quota. Computed on the host in Python floats, because float32
            products could round differently.
        gradients: norm over samples of the dense model's weight gradients that `start` uses; None for none. `start`
            then gets a pair: the prepared statistic, and the norm of the kernel's gradients, float32 [I, O], as in
            `forward.sweep.BlockGradients`.
        configure: (criterion, options of the run) -> criterion, for one with options of its own.
        updates_weights: whether `start` returns updated kernels.
        granularity, alpha: published defaults of the rebuild after this criterion.
    """

    statistic: Callable[[jax.Array], jax.Array] | None
    start: Callable[[jax.Array, Any, int, SparsityPattern, Quota, Selector], tuple[jax.Array, jax.Array | None]]
    prepare: Callable[[jax.Array, int, str, Callable[[str], None]], Any] | None = None
    quota: Callable[[tuple[int, int], float], Quota] = quota_per_output
    gradients: Norm | None = None
    configure: "Callable[[Criterion, Any], Criterion] | None" = None
    updates_weights: bool = False
    granularity: str = "output1"
    alpha: float = 0.01

    def configured(self, options: Any) -> "Criterion":
        """The criterion with its own options, from those of the run."""
        return self.configure(self, options) if self.configure else self
