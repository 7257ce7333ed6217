"""Least squares: the surviving weights of one linear after the other are solved for, by conjugate gradients.

With X [tokens, I] the linear's input on stream B as the linears before it now give it, G = X^T X (tokens weighted as in
the loss) and V [I, O] its kernel under the mask, a change of V's surviving weights is looked for that minimizes

    1/2 tr(change^T G change) - tr(change^T R)

for the sub-block's last linear R = X^T (target - output): the minimum is that of the sub-block's own loss. For the
linears before it R = G (D - V), D the dense kernel: the dense linear's output on the same input.

Few samples are fitted too closely, so a multiple of the identity is added to G; of several, the one with the lowest
loss on held-out samples is taken.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.console.options import OptionGroup
from barber_jax.models.sharding import MODEL, constrain, kernel_axes
from barber_jax.stages import layerwise
from barber_jax.stages.base import INT32_MAX, Stage, Work

DAMPINGS = (0.01, 0.1, 1.0)
"""Candidates for the fraction of its mean diagonal that is added to G's diagonal; the first is SparseGPT's."""


@dataclass(frozen=True, kw_only=True)
class LeastSquaresOptions(OptionGroup):
    """Better weights: solve for those that survive."""

    least_squares: int = 0
    """Steps of conjugate gradients that solve for the surviving weights of each linear; 0 = none."""

    def settle(self) -> None:
        self._require_least(0, "least_squares")
        self._require_most(INT32_MAX, "least_squares")


class LeastSquares(Stage):
    """Least squares as a stage."""

    name = "least squares"
    switch = "--least-squares"
    changes_masks = False

    def enabled(self, options: LeastSquaresOptions) -> bool:
        return options.least_squares > 0

    def validates(self, options: LeastSquaresOptions) -> bool:
        return True

    def __call__(self, work: Work) -> None:
        """Solve for the linears of one input after the other; undo those that do not lower the validation loss."""
        with work.watch.stage(f"{work.sub.name} least squares"):
            chosen = {
                entering: self._solve(work, entering, paths) for entering, paths in layerwise.inputs(work.sub).items()
            }
        work.record.setdefault("least_squares", []).append(chosen)

    def _solve(self, work: Work, entering: str, paths: tuple[str, ...]) -> float | None:
        """Solve for the kernels that read an input; returns the damping that helped most, None if none did."""
        last = work.sub.ends_in_linear and f"{work.sub.linears[-1][0]}.kernel" in paths
        gram, missing = layerwise.summed(work, entering, work.streams.training, lacking=last)
        least, best, updated = work.validation_loss(), None, work.updated
        chosen = updated
        for damping in DAMPINGS:
            amount = (jnp.float32(damping), jnp.int32(work.options.least_squares))
            solved = {
                path: solve(
                    updated.get(path, work.dense[path]),
                    work.dense[path],
                    work.masks[path],
                    gram,
                    missing,
                    *amount,
                    kernel_axes(work.sub, path),
                )
                for path in paths
            }
            work.updated = {**updated, **solved}
            if (loss := work.validation_loss()) < least:
                least, best, chosen = loss, damping, work.updated
        work.updated = chosen
        return best


@partial(jax.jit, static_argnames="axes")
def solve(
    kernel: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    missing: jax.Array | None,
    damping: jax.Array,
    steps: jax.Array,
    axes: tuple[str | None, str | None],
) -> jax.Array:
    """Solve for the surviving weights of a kernel.

    Conjugate gradients, preconditioned by the diagonal of G; every output has step lengths of its own.

    Args:
        kernel: [I, O], as it is now; its values where pruned are not used.
        dense: [I, O], the dense kernel.
        mask: bool [O, I].
        gram: float32 [I, I].
        missing: float32 [I, O], X^T times what the output lacks; None: the dense linear's output is what is wanted.
        damping: float32 scalar, the fraction of G's mean diagonal that is added to its diagonal.
        steps: int32 scalar.
        axes: mesh axes over which the kernel is sharded.

    Returns:
        [I, O] in the dtype of the dense kernel: solved where kept, dense where pruned, the value that a weight regrows
        as.
    """
    kept = constrain(mask.T, None, MODEL)
    diagonal = jnp.diagonal(gram)
    added = damping * jnp.mean(diagonal)
    # A dead input has neither a gradient nor an error; dividing by it must not give NaN.
    scale = (1.0 / jnp.maximum(diagonal + added, jnp.finfo(jnp.float32).tiny))[:, None]

    def product(change: jax.Array) -> jax.Array:
        whole = jnp.matmul(gram, change, precision=lax.Precision.HIGHEST) + added * change
        return constrain(jnp.where(kept, whole, 0.0), None, MODEL)

    def step(_, state):
        change, residual, direction, size = state
        along = product(direction)
        length = _ratio(size, _dot(direction, along))
        change, residual = change + length * direction, residual - length * along
        scaled = scale * residual
        after = _dot(residual, scaled)
        return change, residual, scaled + _ratio(after, size) * direction, after

    full = dense.astype(jnp.float32)
    start = constrain(jnp.where(kept, kernel.astype(jnp.float32), 0.0), None, MODEL)
    right = jnp.matmul(gram, full - start, precision=lax.Precision.HIGHEST) if missing is None else missing
    residual = constrain(jnp.where(kept, right, 0.0), None, MODEL)
    first = scale * residual
    state = (jnp.zeros_like(start), residual, first, _dot(residual, first))
    change = lax.fori_loop(0, steps, step, state)[0]
    return constrain(jnp.where(kept, start + change, full).astype(dense.dtype), *axes)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Scalar product of each output's weights, [I, O] and [I, O] -> [1, O]."""
    return jnp.sum(left * right, axis=0, keepdims=True)


def _ratio(over: jax.Array, under: jax.Array) -> jax.Array:
    """Quotient, or zero where an output's error has its minimum already."""
    return jnp.where(under > 0, over / jnp.where(under > 0, under, 1.0), 0.0)


STAGE = LeastSquares()
