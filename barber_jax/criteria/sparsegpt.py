"""SparseGPT: prune input by input and update the remaining weights to compensate (arXiv 2301.00774, algorithm 1).

H = (2 / S) * sum X^T X of a linear's input, with a fraction of its mean diagonal added to the diagonal; U is the upper
Cholesky factor of its inverse, H^-1 = U^T U. The inputs are processed in order. Pruning a weight w_i gives the error
w_i / U_ii, and this error times row i of U is subtracted from the weights of the later inputs (optimal brain surgeon).
The score is w^2 / U_ii^2 with the weights updated so far; it is compared within blocks of 128 inputs (unstructured) or
within groups (N:M).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from barber_jax.console.errors import BarberError
from barber_jax.criteria.base import Criterion, Quota
from barber_jax.masks import selection
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selector import Selector

BLOCK = 128
"""Inputs in a block."""
DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""Fractions of the mean diagonal of H to add to its diagonal, tried in this order."""


def statistic(x: jax.Array) -> jax.Array:
    """Gram matrix X^T X over samples and tokens: [S, L, I] -> float32 [I, I]."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(flat.T, flat, precision=lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames="samples")
def inverse_factor(gram: jax.Array, samples: int, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the upper Cholesky factor U of H^-1 = U^T U, and find dead inputs.

    The Cholesky decomposition of H with both axes reversed gives H = M M^T with M upper triangular, so that U = M^-1
    and H itself need not be inverted.

    Args:
        gram: float32 [I, I], X^T X summed over samples and tokens.
        samples: number of samples.
        damping: fraction of the mean diagonal to add to the diagonal.

    Returns:
        U, float32 [I, I], which is not finite if H is not positive definite in float32; and bool [I], True = dead: the
        input is zero in all samples.
    """
    hessian = gram * (2.0 / samples)
    dead = jnp.diagonal(hessian) == 0
    hessian = hessian + jnp.diag(dead.astype(jnp.float32))
    hessian = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(len(hessian), dtype=jnp.float32)
    upper = jnp.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return solve_triangular(upper, jnp.eye(len(hessian), dtype=jnp.float32), lower=False), dead


def prepare(gram: jax.Array, samples: int, name: str, say: Callable[[str], None]) -> tuple[jax.Array, jax.Array]:
    """Compute `inverse_factor` with the smallest damping of `DAMPINGS` that makes H positive definite.

    Args:
        gram: float32 [I, I], X^T X summed over samples and tokens.
        samples: number of samples.
        name: of the input, for messages.
        say: prints a line; called if the damping is raised.

    Raises:
        BarberError: H is not positive definite with any of them.
    """
    for damping in DAMPINGS:
        factor, dead = inverse_factor(gram, samples, jnp.float32(damping))
        if bool(jnp.isfinite(factor).all()):
            if damping != DAMPINGS[0]:
                say(f"sparsegpt: the Hessian of {name} is not positive definite; damping raised to {damping:g}")
            return factor, dead
    raise BarberError(
        f"sparsegpt: the Hessian of {name} cannot be factored even with damping {DAMPINGS[-1]:g}; "
        "use more or other calibration samples, or --method wanda"
    )


def quota(shape: tuple[int, int], sparsity: float) -> Quota:
    """Number of weights to prune in each block of 128 inputs, and in the narrower block that may remain at the end.

    The threshold is the score at index floor(p * n) of a block's n ascending scores, and weights at the threshold are
    pruned too. That makes floor(p * n) + 1 weights, apart from ties, or none for p = 0.
    """
    outputs, inputs = shape
    width = min(BLOCK, inputs)
    return tuple(int(columns * outputs * sparsity) + 1 if sparsity else 0 for columns in (width, inputs % width))


def start(
    kernel: jax.Array,
    prepared: tuple[jax.Array, jax.Array],
    samples: int,
    pattern: SparsityPattern,
    quota: Quota,
    select: Selector,
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix and update its remaining weights.

    Unstructured: in each block of 128 inputs, over all outputs, prune the scores at or below the threshold, the score
    at index floor(p * n) of the block's n ascending scores. N:M: prune the M-N lowest of each group, with the weights
    as they are when its first input is reached; of equal scores the one at the lower index is pruned first.

    Args:
        kernel: float32 [I, O].
        prepared: from `prepare`.
        samples: not used.
        quota: from `quota`; empty for N:M.
        select: of the matrix; for N:M, as all outputs of a block are compared.

    Returns:
        bool [O, I] mask, True = kept, and the updated kernel float32 [I, O], zero where pruned.
    """
    factor, dead = prepared
    inputs = kernel.shape[0]
    kernel = jnp.where(dead[:, None], 0.0, kernel)
    # N:M groups must not straddle blocks. For N:M the width of a block only affects the order of rounding.
    width = max(BLOCK // pattern.of, 1) * pattern.of if pattern.structured else BLOCK
    width = min(width, inputs)
    full_blocks = inputs // width
    block_count, rest_count = quota or (None, None)

    def step(kernel, index):
        return _prune_block(kernel, factor, index * width, width, pattern, block_count, select)

    kernel, pruned = lax.scan(step, kernel, jnp.arange(full_blocks))
    pruned = pruned.reshape(full_blocks * width, -1)
    if inputs % width:
        kernel, rest = _prune_block(kernel, factor, full_blocks * width, inputs % width, pattern, rest_count, select)
        pruned = jnp.concatenate([pruned, rest])
    return ~pruned.T, kernel


def _prune_block(
    kernel: jax.Array,
    factor: jax.Array,
    first: jax.Array | int,
    width: int,
    pattern: SparsityPattern,
    count: jax.Array | None,
    select: Selector,
) -> tuple[jax.Array, jax.Array]:
    """Prune the block of `width` inputs that begins at input `first`, and update the weights of later inputs.

    Args:
        kernel: float32 [I, O].
        factor: U, float32 [I, I].
        count: number of weights to prune, apart from ties; None for N:M.
        select: of the matrix.

    Returns:
        The updated kernel float32 [I, O], and bool [width, O], True = pruned.
    """
    outputs = kernel.shape[1]
    rows = lax.dynamic_slice(factor, (first, 0), (width, factor.shape[1]))
    within = lax.dynamic_slice(rows, (0, first), (width, width))
    diagonal = jnp.diagonal(within)
    size = pattern.of if pattern.structured else width

    def group(index, state):
        block, done, errors, pruned = state
        start = index * size
        scale = lax.dynamic_slice(diagonal, (start,), (size,))[:, None]
        score = jnp.square(lax.dynamic_slice(block, (start, 0), (size, outputs))) / jnp.square(scale)
        drop = _select(score, pattern, count, select)

        def column(i, state):
            block, done, errors = state
            at = start + i
            weight = block[at]
            remaining = jnp.where(drop[i], 0.0, weight)
            error = (weight - remaining) / diagonal[at]
            # Row `at` of U is zero before its diagonal, so inputs that are already processed do not change.
            block = block - within[at][:, None] * error[None, :]
            return block, done.at[at].set(remaining), errors.at[at].set(error)

        block, done, errors = lax.fori_loop(0, size, column, (block, done, errors))
        return block, done, errors, lax.dynamic_update_slice(pruned, drop, (start, 0))

    block = lax.dynamic_slice(kernel, (first, 0), (width, outputs))
    zeros = jnp.zeros_like(block)
    state = (block, zeros, zeros, jnp.zeros(block.shape, bool))
    _, done, errors, pruned = lax.fori_loop(0, width // size, group, state)
    later = jnp.arange(factor.shape[1]) >= first + width
    update = jnp.matmul(jnp.where(later, rows, 0.0).T, errors, precision=lax.Precision.HIGHEST)
    return lax.dynamic_update_slice(kernel - update, done, (first, 0)), pruned


def _select(score: jax.Array, pattern: SparsityPattern, count: jax.Array | None, select: Selector) -> jax.Array:
    """Select the scores [inputs, O] to prune, as a bool array of the same shape."""
    if pattern.structured:
        return ~select.keep_n_of_m(score.T, pattern.keep, pattern.of).T
    return selection.lowest_with_ties(score, count)


CRITERION = Criterion(
    statistic=statistic, start=start, prepare=prepare, quota=quota, updates_weights=True, granularity="layer", alpha=0.1
)
