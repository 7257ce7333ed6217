"""Layer-wise least squares: what one linear's output loses, from the Gram matrix of its input.

For a linear with input X [tokens, I] on stream B (with the weights that the sub-block has by then), G = X^T X and an
output's weights v, the squared error against an aim Y is v^T G v - 2 v^T X^T Y + const. Y is the dense linear's output
on the same X for the linears that read the sub-block's input, and what is left of the sub-block's target (targets.py)
for the linear that ends it, which so makes up for the ones before.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.config import TokenWeighting
from barber_jax.mesh import DATA, constrain
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.passes import Parameters, sparsify
from barber_jax.rebuild import token_weights

SHRINKAGES = (0.1, 0.5, 2.0)
"""Fractions of its diagonal that are added to G, to choose from. Few samples tell little of how inputs go together, and
what fits them alone does harm elsewhere; with the diagonal alone, swaps would be those of Wanda's score and weights
would stay."""


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
    masks: dict[str, jax.Array],
    stream: jax.Array,
    target: jax.Array,
    weighting: TokenWeighting,
) -> tuple[jax.Array, jax.Array]:
    """Second moments of an input of a sub-block's linears over a chunk of stream B.

    Args:
        entering: which input.
        parameters: of the block, this sub-block's as they are now.
        masks: kernel path -> bool [out, in], of the sub-block.
        stream, target: [M, B, L, D].
        weighting: of tokens, see `rebuild.token_weights`.

    Returns:
        X^T X float32 [I, I], and X^T (T - bias) float32 [I, D] for the linear that ends the sub-block, T the target;
        zero where another reads this input.
    """
    last, reader = sub.linears[-1]
    bias = parameters.get(f"{last}.bias", 0.0)
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total, pair):
        hidden, wanted = (constrain(each, DATA) for each in pair)
        seen = {}
        block.apply(sub.name, block.enter(sub.name, hidden), seen.__setitem__)
        flat = seen[entering].reshape(-1, seen[entering].shape[-1]).astype(jnp.float32)
        aim = wanted.reshape(len(flat), -1).astype(jnp.float32) - bias
        weights = token_weights(block, hidden, wanted, weighting)
        left = flat if weights is None else flat * weights.reshape(-1, 1)
        product = partial(jnp.matmul, left.T, precision=lax.Precision.HIGHEST)
        crossed = total[1] + product(aim) if entering == reader else total[1]
        return (constrain(total[0] + product(flat)), constrain(crossed)), None

    size = dict(definition.shapes)[inputs(sub)[entering][0]][0]
    zeros = (jnp.zeros((size, size), jnp.float32), jnp.zeros((size, stream.shape[-1]), jnp.float32))
    return lax.scan(micro_batch, zeros, (stream, target))[0]


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
