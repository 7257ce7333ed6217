"""Layer-wise least squares: what one linear's output loses, from the Gram matrix of its input.

For a linear with input X [tokens, I] on stream B (with the weights that the sub-block has by then), G = X^T X and an
output's weights v, the squared error against an aim Y is v^T G v - 2 v^T X^T Y + const. Y is the dense linear's output
on the same X for the linears that do not end the sub-block. For the one that does (it alone reads its input) it is the
sub-block's target (targets.py), in two parts: what the dense sub-block gives on the same inputs, and E, what was lost
before this sub-block and is carried in its residual stream.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.config import TokenWeighting
from barber_jax.mesh import DATA, constrain
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.passes import Parameters, sparsify
from barber_jax.rebuild import token_weights
from barber_jax.refine import refine

SHRINKAGES = (0.01, 0.1, 0.5, 2.0)
"""Fractions of its diagonal that are added to G, to choose from. Few samples tell little of how inputs go together, and
what fits them alone does harm elsewhere; with the diagonal alone, swaps would be those of Wanda's score and weights
would stay."""


@dataclass
class Moments:
    """Second moments of an input of a sub-block's linears, tokens weighted by `rebuild.token_weights`.

    Attributes:
        gram: float32 [I, I], X^T X.
        ending: float32 [I, D], X^T f(W; H) less the bias for the linear that ends the sub-block; None where another
            reads this input.
        carried: float32 [I, D], X^T E; None too where the target is f(W; H) itself.
    """

    gram: jax.Array
    ending: jax.Array | None
    carried: jax.Array | None

    def aim(self, dense: jax.Array) -> jax.Array:
        """X^T Y, Y what a linear with the dense kernel [I, O] is to give, without what is carried."""
        return dense_aim(self.gram, dense) if self.ending is None else self.ending


jax.tree_util.register_dataclass(Moments, ["gram", "ending", "carried"], [])


def inputs(sub: SubBlock) -> dict[str, tuple[str, ...]]:
    """Inputs of a sub-block's linears in order, each with the kernels that read it."""
    readers: dict[str, tuple[str, ...]] = {}
    for linear, entering in sub.linears:
        readers[entering] = (*readers.get(entering, ()), f"{linear}.kernel")
    return readers


@partial(jax.jit, static_argnames=("definition", "sub", "entering", "weighting"))
def moments(
    definition: BlockDefinition,
    sub: SubBlock,
    entering: str,
    parameters: Parameters,
    dense: Parameters | None,
    masks: dict[str, jax.Array],
    stream: jax.Array,
    target: jax.Array,
    weighting: TokenWeighting,
) -> Moments:
    """Second moments of an input of a sub-block's linears over a chunk of stream B.

    Args:
        entering: which input.
        parameters: of the block, this sub-block's as they are now.
        dense: of the block, this sub-block's as they were; None where the target is what they give.
        masks: kernel path -> bool [out, in], of the sub-block.
        stream, target: [M, B, L, D].
        weighting: of tokens, see `rebuild.token_weights`.
    """
    last, reader = sub.linears[-1]
    bias = parameters.get(f"{last}.bias", 0.0)
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total: Moments, pair: tuple[jax.Array, jax.Array]) -> tuple[Moments, None]:
        hidden, wanted = (constrain(each, DATA) for each in pair)
        seen = {}
        block.apply(sub.name, block.enter(sub.name, hidden), seen.__setitem__)
        flat = seen[entering].reshape(-1, seen[entering].shape[-1]).astype(jnp.float32)
        weights = token_weights(block, hidden, wanted, weighting)
        left = flat if weights is None else flat * weights.reshape(-1, 1)

        def product(outputs: jax.Array) -> jax.Array:
            outputs = outputs.reshape(len(flat), -1).astype(jnp.float32)
            return jnp.matmul(left.T, outputs, precision=lax.Precision.HIGHEST)

        ending = carried = None
        if entering == reader:
            given = wanted
            if dense is not None:
                block_before = definition.bind(dense)
                given = block_before.apply(sub.name, block_before.enter(sub.name, hidden))
                carried = product(wanted.astype(jnp.float32) - given.astype(jnp.float32))
            ending = product(given.astype(jnp.float32) - bias)
        new = Moments(product(flat), ending, carried)
        return constrain(jax.tree.map(jnp.add, total, new)), None

    size, width = dict(definition.shapes)[inputs(sub)[entering][0]][0], stream.shape[-1]
    zeros = jnp.zeros((size, width), jnp.float32)
    ending, carried = (zeros, zeros if dense is not None else None) if entering == reader else (None, None)
    return lax.scan(micro_batch, Moments(jnp.zeros((size, size), jnp.float32), ending, carried), (stream, target))[0]


@jax.jit
def shrunk(gram: jax.Array, shrinkage: jax.Array) -> jax.Array:
    """G with more weight on its diagonal."""
    return gram + shrinkage * jnp.diag(jnp.diagonal(gram))


@jax.jit
def dense_aim(gram: jax.Array, kernel: jax.Array) -> jax.Array:
    """X^T Y for the dense kernel's [I, O] own output Y on X."""
    return jnp.matmul(gram, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)


@jax.jit
def solve(
    kernel: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    aim: jax.Array,
    iterations: jax.Array,
    shrinkage: jax.Array,
) -> jax.Array:
    """Surviving weights nearer to the least squares, every output with its own support, by conjugate gradients.

    Minimises v^T G v - 2 v^T X^T Y + (v - v0)^T R (v - v0) over the kept weights v of every output, v0 those at the
    start, R `shrinkage` times the diagonal of G; preconditioned by the diagonal. The value falls in every iteration.

    Args:
        kernel: [I, O]. mask: bool [O, I], True = kept.
        gram: float32 [I, I]. aim: float32 [I, O], X^T Y.
        iterations: int32. shrinkage: float32.

    Returns:
        float32 [I, O], the kernel's own values where pruned.
    """
    kept = mask.T
    kernel = kernel.astype(jnp.float32)
    ridged = shrunk(gram, shrinkage)
    diagonal = jnp.diagonal(ridged)[:, None]
    scale = jnp.where(diagonal > 0, 1.0 / jnp.where(diagonal > 0, diagonal, 1.0), 0.0)
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def iterate(_, state):
        v, residual, direction, size = state
        curved = jnp.where(kept, product(ridged, direction), 0.0)
        curvature = jnp.sum(direction * curved, axis=0)
        step = jnp.where(curvature > 0, size / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        residual = residual - step * curved
        scaled = scale * residual
        new = jnp.sum(residual * scaled, axis=0)
        ratio = jnp.where(size > 0, new / jnp.where(size > 0, size, 1.0), 0.0)
        return v + step * direction, residual, scaled + ratio * direction, new

    start = jnp.where(kept, kernel, 0.0)
    # At the start the ridge pulls nowhere.
    residual = jnp.where(kept, aim - product(gram, start), 0.0)
    scaled = scale * residual
    state = (start, residual, scaled, jnp.sum(residual * scaled, axis=0))
    solved = lax.fori_loop(0, iterations, iterate, state)[0]
    return jnp.where(kept, solved, kernel)


@jax.jit
def combine(
    solved: jax.Array,
    carrying: jax.Array | None,
    mask: jax.Array,
    gram: jax.Array,
    aim: jax.Array,
    carried: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Weights that are best on other samples, of those that add some share of a correction.

    With u the weights solved for what the dense sub-block gives and d those solved for what is carried, the error of
    u + t d on the samples that `gram`, `aim` and `carried` are of is a parabola in t. Its least point is taken, but not
    t < 0.

    Args:
        solved: float32 [I, O], u. carrying: float32 [I, O], d; None: there is none.
        mask: bool [O, I]. gram, aim, carried: moments of the other samples.

    Returns:
        float32 [I, O], u's own values where pruned; t.
    """
    if carrying is None:
        return solved, jnp.float32(0)
    u, d = (jnp.where(mask.T, each, 0.0) for each in (solved, carrying))
    curved = jnp.matmul(gram, d, precision=lax.Precision.HIGHEST)
    curvature = jnp.sum(d * curved)
    slope = jnp.sum(d * (aim + carried)) - jnp.sum(u * curved)
    share = jnp.where(curvature > 0, jnp.maximum(slope, 0.0) / jnp.where(curvature > 0, curvature, 1.0), 0.0)
    return solved + share * d, constrain(share)


@jax.jit
def misfit(kernel: jax.Array, mask: jax.Array, gram: jax.Array, aim: jax.Array) -> jax.Array:
    """Squared error of a kernel [I, O] under a mask [O, I] against an aim [I, O] (X^T Y), less what none can change."""
    v = jnp.where(mask.T, kernel.astype(jnp.float32), 0.0)
    return constrain(jnp.sum(v * (jnp.matmul(gram, v, precision=lax.Precision.HIGHEST) - 2 * aim)))


@dataclass
class Improved:
    """A matrix, improved.

    Attributes:
        kernel: [I, O], where pruned what a weight is when revived.
        mask: bool [O, I].
        shrinkage: what it was found with.
        share: of the correction of what is carried.
    """

    kernel: jax.Array
    mask: jax.Array
    shrinkage: float
    share: float


def improved(
    kernel: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    fitted: Moments,
    judging: Moments,
    swaps: int,
    iterations: int,
    *,
    of: int,
) -> Improved | None:
    """Swap and solve for one matrix with every shrinkage; the best on other samples, or None: none is better there.

    Args:
        kernel: [I, O], as it is now. dense: [I, O], as it was. mask: bool [O, I].
        fitted: moments to learn from. judging: those of other samples.
        swaps: for every output, 0: masks stay. iterations: of `solve`, 0: weights stay.
        of: M of an N:M pattern, 0: unstructured.
    """
    learned, judged = fitted.aim(dense), judging.aim(dense)
    wanted = judged if judging.carried is None else judged + judging.carried
    least, best = float(misfit(kernel, mask, judging.gram, wanted)), None
    for shrinkage in SHRINKAGES:
        new, value, share = mask, kernel, 0.0
        if swaps:
            gram = shrunk(fitted.gram, jnp.float32(shrinkage))
            new, _, _ = refine(kernel, dense, mask, gram, jnp.int32(swaps), of=of)
            value = jnp.where(new.T, kernel, dense)
        if iterations:
            size = (jnp.int32(iterations), jnp.float32(shrinkage))
            carrying, value = None, solve(value, new, fitted.gram, learned, *size)
            if fitted.carried is not None:
                carrying = solve(jnp.zeros_like(value), new, fitted.gram, fitted.carried, *size)
            value, share = combine(value, carrying, new, judging.gram, judged, judging.carried)
            value = value.astype(dense.dtype)
        loss = float(misfit(value, new, judging.gram, wanted))
        if loss < least:
            least, best = loss, Improved(value, new, shrinkage, float(share))
    return best
