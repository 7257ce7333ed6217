"""SparseGPT: prune column by column and let the remaining weights make up for it (arXiv 2301.00774, algorithm 1).

H = (2 / S) * sum X^T X of a linear's input, damped by a fraction of its mean diagonal; U the upper Cholesky factor of
its inverse, H^-1 = U^T U. Going through the inputs in order, a pruned weight w_i leaves the error w_i / U_ii, which is
spread over the inputs after it by row i of U (optimal brain surgeon). Which weights go is decided for 128 inputs at
a time (unstructured) or for each group (N:M), by w^2 / U_ii^2 of the weights as they are by then.
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

BLOCK = 128
DAMPINGS = (0.01, 0.1, 1.0, 10.0)


def statistic(x: jax.Array) -> jax.Array:
    """X^T X over samples and tokens: [S, L, I] -> float32 [I, I]."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(flat.T, flat, precision=lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames="samples")
def inverse_factor(gram: jax.Array, samples: int, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper factor U of H^-1 = U^T U, and the dead inputs.

    With both axes reversed the Cholesky factor of H is upper triangular, H = M M^T, so that U = M^-1: no inverse of
    H itself is formed.

    Args:
        gram: float32 [I, I], sum of X^T X over samples.
        samples: their number.
        damping: fraction of the mean diagonal to add to the diagonal.

    Returns:
        U float32 [I, I], not finite where H is not positive definite in float32, and bool [I], True = input never
        active.
    """
    hessian = gram * (2.0 / samples)
    dead = jnp.diagonal(hessian) == 0
    hessian = hessian + jnp.diag(dead.astype(jnp.float32))
    hessian = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(len(hessian), dtype=jnp.float32)
    upper = jnp.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return solve_triangular(upper, jnp.eye(len(hessian), dtype=jnp.float32), lower=False), dead


def prepare(gram: jax.Array, samples: int, name: str, say: Callable[[str], None]) -> tuple[jax.Array, jax.Array]:
    """`inverse_factor` with the smallest damping of `DAMPINGS` for which it exists; says so when it is not the first.

    Raises:
        BarberError: none works.
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
    """How many scores are at or below the threshold of a block of 128 inputs, and of what is left of a matrix [O, I]
    after such blocks: that at index floor(p * n) of n ascending ones is among them, unless nothing is to be pruned."""
    outputs, inputs = shape
    width = min(BLOCK, inputs)
    return tuple(int(columns * outputs * sparsity) + 1 if sparsity else 0 for columns in (width, inputs % width))


def start(
    kernel: jax.Array, prepared: tuple[jax.Array, jax.Array], samples: int, pattern: SparsityPattern, quota: Quota
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix and update what is left.

    Unstructured: in every 128 inputs, over all outputs, what scores at or below the value at index floor(p * n) of
    the block's n ascending scores. N:M: the M-N lowest of each group when its first input's turn comes, ties to the
    lower index.

    Args:
        kernel: float32 [I, O].
        prepared: from `prepare`.
        quota: from `quota`.

    Returns:
        bool [O, I] mask, True = kept, and the updated kernel float32 [I, O], zero where pruned.
    """
    factor, dead = prepared
    inputs = kernel.shape[0]
    kernel = jnp.where(dead[:, None], 0.0, kernel)
    # Groups must not straddle blocks; for N:M the width of a block changes nothing but the order of rounding.
    width = max(BLOCK // pattern.of, 1) * pattern.of if pattern.structured else BLOCK
    width = min(width, inputs)
    whole = inputs // width
    in_block, in_rest = quota or (None, None)

    def step(kernel, at):
        return _block(kernel, factor, at * width, width, pattern, in_block)

    kernel, pruned = lax.scan(step, kernel, jnp.arange(whole))
    pruned = pruned.reshape(whole * width, -1)
    if inputs % width:
        kernel, rest = _block(kernel, factor, whole * width, inputs % width, pattern, in_rest)
        pruned = jnp.concatenate([pruned, rest])
    return ~pruned.T, kernel


def _block(
    kernel: jax.Array,
    factor: jax.Array,
    first: jax.Array | int,
    width: int,
    pattern: SparsityPattern,
    count: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Prune `width` inputs from `first` on, `count` of their weights unless the pattern is N:M; returns the whole
    kernel and bool [width, O] of what was pruned."""
    outputs = kernel.shape[1]
    rows = lax.dynamic_slice(factor, (first, 0), (width, factor.shape[1]))
    own = lax.dynamic_slice(rows, (0, first), (width, width))
    diagonal = jnp.diagonal(own)
    size = pattern.of if pattern.structured else width

    def group(index, state):
        block, done, errors, pruned = state
        start = index * size
        scale = lax.dynamic_slice(diagonal, (start,), (size,))[:, None]
        score = jnp.square(lax.dynamic_slice(block, (start, 0), (size, outputs))) / jnp.square(scale)
        drop = _select(score, pattern, count)

        def column(i, state):
            block, done, errors = state
            at = start + i
            weight = block[at]
            left = jnp.where(drop[i], 0.0, weight)
            error = (weight - left) / diagonal[at]
            # Row `at` of U is zero before its diagonal: inputs already done stay as they are.
            block = block - own[at][:, None] * error[None, :]
            return block, done.at[at].set(left), errors.at[at].set(error)

        block, done, errors = lax.fori_loop(0, size, column, (block, done, errors))
        return block, done, errors, lax.dynamic_update_slice(pruned, drop, (start, 0))

    block = lax.dynamic_slice(kernel, (first, 0), (width, outputs))
    blank = jnp.zeros_like(block)
    state = (block, blank, blank, jnp.zeros(block.shape, bool))
    _, done, errors, pruned = lax.fori_loop(0, width // size, group, state)
    later = jnp.arange(factor.shape[1]) >= first + width
    spread = jnp.matmul(jnp.where(later, rows, 0.0).T, errors, precision=lax.Precision.HIGHEST)
    return lax.dynamic_update_slice(kernel - spread, done, (first, 0)), pruned


def _select(score: jax.Array, pattern: SparsityPattern, count: jax.Array | None) -> jax.Array:
    """Which of the scores [inputs, O] to prune."""
    if pattern.structured:
        return ~selection.keep_n_of_m(score.T, pattern.keep, pattern.of).T
    return selection.lowest_through(score, count)


CRITERION = Criterion(statistic=statistic, start=start, prepare=prepare, quota=quota, granularity="layer", alpha=0.1)
