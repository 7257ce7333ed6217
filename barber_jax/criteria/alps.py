"""ALPS: find which weights to keep, and their values, by operator splitting (ADMM), then solve for the values alone
(Meng et al., arXiv 2406.07831, algorithms 1 and 2).

With W^ the dense weights of a linear and H = (2 / S) * sum X^T X of its input, damped as for SparseGPT, ALPS looks for
W with k weights that are not zero (or an N:M pattern) and the lowest tr (W - W^)^T H (W - W^). All of it is done in
scaled weights E^-1 W with E = diag(H)^-1/2, for which H becomes E H E = Q M Q^T, with a diagonal of ones.

ADMM keeps two copies of the weights, W for the error and D for the pattern, and a multiplier V that unites them:

    W <- (H + rho I)^-1 (H W^ - V + rho D)
    D <- P_k(W + V / rho)                       the k largest of the matrix by magnitude, the others zero
    V <- V + rho (W - D)

Since rho grows, D settles. Every third step it is multiplied by 1.3, 1.2 or 1.1, by how many weights entered or left
D's support meanwhile: at least k / 10, at least k / 200, or fewer; when there are none, the support is final.
On this support, conjugate gradients minimize the error over the kept weights, from D on.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.console.errors import BarberError
from barber_jax.criteria.base import Criterion, Quota, quota_per_matrix
from barber_jax.criteria.sparsegpt import DAMPINGS, statistic
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selection import AXES
from barber_jax.masks.selector import Selector
from barber_jax.models.sharding import MODEL, constrain

RHO = 0.1
"""The first rho."""
STEPS = 3
"""Steps between two changes of rho."""
GROWTHS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Support that changed, as a fraction of the kept weights -> factor of rho; the first that applies."""
MOST_ROUNDS = 100
"""Changes of rho at most, should the support not settle before."""
SOLVER_STEPS = 10
"""Steps of conjugate gradients on the final support."""


class Layer(NamedTuple):
    """What the linears that read one input have in common.

    Attributes:
        gram: float32 [I, I], X^T X summed over samples and tokens.
        added: float32 [I], added to the diagonal of H: the damping, and 1 for dead inputs.
        scale: float32 [I], the diagonal of E.
        vectors, values: Q float32 [I, I], and the diagonal of M float32 [I], ascending.
        dead: bool [I], True = the input is zero in all samples.
    """

    gram: jax.Array
    added: jax.Array
    scale: jax.Array
    vectors: jax.Array
    values: jax.Array
    dead: jax.Array


@partial(jax.jit, static_argnames="samples")
def decompose(gram: jax.Array, samples: int) -> Layer:
    """Damp and scale H, and compute its eigenvalues and eigenvectors.

    Args:
        gram: float32 [I, I], X^T X summed over samples and tokens.
        samples: number of samples.
    """
    diagonal = jnp.diagonal(gram) * (2.0 / samples)
    dead = diagonal == 0
    alive = diagonal + dead
    added = dead + DAMPINGS[0] * jnp.mean(alive)
    scale = lax.rsqrt(diagonal + added)
    scaled = (gram * (2.0 / samples)) * scale * scale[:, None] + jnp.diag(added * jnp.square(scale))
    vectors, values = lax.linalg.eigh(scaled, symmetrize_input=False)
    # Where H is nearly singular, rounding makes its lowest eigenvalues negative.
    return Layer(gram, added, scale, vectors, jnp.maximum(values, 0.0), dead)


def prepare(gram: jax.Array, samples: int, name: str, say: Callable[[str], None]) -> Layer:
    """Compute `decompose`.

    Args:
        gram: float32 [I, I], X^T X summed over samples and tokens.
        samples: number of samples.
        name: of the input, for messages.
        say: not used.

    Raises:
        BarberError: the eigenvalues are not finite.
    """
    layer = decompose(gram, samples)
    if not bool(jnp.isfinite(layer.values).all() & jnp.isfinite(layer.vectors).all()):
        raise BarberError(
            f"alps: the eigenvalues of the Hessian of {name} are not finite; "
            "use more or other calibration samples, or --method wanda"
        )
    return layer


def start(
    kernel: jax.Array, layer: Layer, samples: int, pattern: SparsityPattern, quota: Quota, select: Selector
) -> tuple[jax.Array, jax.Array]:
    """Prune one matrix and update its remaining weights.

    Args:
        kernel: float32 [I, O].
        layer: from `prepare`.
        samples: number of samples.
        quota: one number, from `quota_per_matrix`; empty for N:M.
        select: of the matrix.

    Returns:
        bool [O, I] mask, True = kept, and the updated kernel float32 [I, O], zero where pruned.
    """
    # Outputs share nothing but the selection, so spread over devices by outputs every product is local.
    dense = constrain(jnp.where(layer.dead, 0.0, kernel.T), MODEL)
    target = dense / layer.scale
    mask, values = support(target, layer, pattern, quota, select)
    values = solve(target, values, mask, layer, samples)
    # Adding the change leaves weights that did not change as they are, to the last bit.
    return mask, jnp.where(mask, dense + (values - target) * layer.scale, 0.0).T


def support(
    target: jax.Array, layer: Layer, pattern: SparsityPattern, quota: Quota, select: Selector
) -> tuple[jax.Array, jax.Array]:
    """Choose the weights to keep, by ADMM (algorithm 1).

    After D <- P_k(C) of C = W + V / rho, D is C where it keeps weights and zero elsewhere, and V / rho is C where D is
    zero and zero elsewhere: one array holds both. W is computed as W^ plus a change, which is more precise.

    Args:
        target: float32 [O, I], scaled dense weights.
        quota: one number; empty for N:M.
        select: of the matrix.

    Returns:
        bool [O, I] mask, True = kept, and D, float32 [O, I], zero elsewhere.
    """

    def step(both: jax.Array, mask: jax.Array, rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        pull = _multiply(jnp.where(mask, both, -both) - target, layer.vectors) * (rho / (layer.values + rho))
        both = target + _multiply(pull, layer.vectors.T) + jnp.where(mask, 0.0, both)
        score = jnp.abs(both)
        if pattern.structured:
            return both, select.keep_n_of_m(score, pattern.keep, pattern.of)
        return both, select.keep_highest(score, quota[0], AXES["layer"])

    def advance(state):
        both, before, rho, rounds, _ = state
        both, mask = lax.fori_loop(0, STEPS, lambda _, pair: step(*pair, rho), (both, before))
        changed = _count(mask != before)
        kept = _count(mask)
        growth = jnp.select([changed >= kept * fraction for fraction, _ in GROWTHS], [f for _, f in GROWTHS])
        # V stays as it is, so V / rho shrinks as rho grows.
        return jnp.where(mask, both, both / growth), mask, rho * growth, rounds + 1, changed

    def unsettled(state):
        *_, rounds, changed = state
        return (rounds < MOST_ROUNDS) & (changed > 0)

    first = (target, jnp.ones(target.shape, bool), jnp.float32(RHO), jnp.int32(0), jnp.float32(1))
    both, mask, *_ = lax.while_loop(unsettled, advance, first)
    return mask, jnp.where(mask, both, 0.0)


def solve(
    target: jax.Array, values: jax.Array, mask: jax.Array, layer: Layer, samples: int, steps: int = SOLVER_STEPS
) -> jax.Array:
    """Minimize the error over the kept weights, by conjugate gradients (algorithm 2).

    The preconditioner, the diagonal of H, is the scaling. Every output takes steps of its own length, which the same
    products allow; in the paper all outputs share one.

    Args:
        target: float32 [O, I], scaled dense weights.
        values: float32 [O, I], scaled weights to begin from, zero where pruned.
        mask: bool [O, I], True = kept.
        samples: number of samples.

    Returns:
        float32 [O, I], zero where pruned.
    """

    def curved(weights: jax.Array) -> jax.Array:
        product = _multiply(weights * layer.scale, layer.gram) * (2.0 / samples)
        return jnp.where(mask, (product + weights * layer.scale * layer.added) * layer.scale, 0.0)

    def step(_, state):
        values, residual, direction, size = state
        product = curved(direction)
        length = _ratio(size, _dot(direction, product))
        values, residual = values + length * direction, residual - length * product
        after = _dot(residual, residual)
        return values, residual, residual + _ratio(after, size) * direction, after

    residual = curved(target - values)
    return lax.fori_loop(0, steps, step, (values, residual, residual, _dot(residual, residual)))[0]


def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    return constrain(jnp.matmul(left, right, precision=lax.Precision.HIGHEST), MODEL)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Scalar product of every output's weights: [O, I] and [O, I] -> [O, 1]."""
    return jnp.sum(left * right, axis=1, keepdims=True)


def _ratio(over: jax.Array, under: jax.Array) -> jax.Array:
    """Quotient, or zero where an output's error has already its minimum."""
    return jnp.where(under > 0, over / jnp.where(under > 0, under, 1.0), 0.0)


def _count(flags: jax.Array) -> jax.Array:
    """Number of set flags [O, I] as a float32."""
    return jnp.sum(jnp.sum(flags, axis=1, dtype=jnp.float32))


CRITERION = Criterion(
    statistic=statistic,
    start=start,
    prepare=prepare,
    quota=quota_per_matrix,
    updates_weights=True,
    granularity="layer",
    alpha=0.1,
)
