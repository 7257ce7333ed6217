"""Layer-wise errors: what one linear's output loses, from the Gram matrix of its input, and masks that lose less.

For a linear with input X [tokens, I] on stream B, with the weights that the sub-block has by then, G = X^T X. An output
whose dense weights d became v loses (v - d)^T G (v - d).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.config import TokenWeighting
from barber_jax.devices.mesh import DATA, constrain
from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.stages.rebuild import token_weights
from barber_jax.stages.refine import errors, refine

SHRINKAGES = (0.01, 0.1, 0.5, 2.0)
"""Fractions of its diagonal that are added to G, to choose from. Few samples tell little of how inputs go together, and
what fits them alone does harm elsewhere; with the diagonal alone, swaps would be those of Wanda's score."""


def inputs(sub: SubBlock) -> dict[str, tuple[str, ...]]:
    """Inputs of a sub-block's linears in order, each with the kernels that read it."""
    readers: dict[str, tuple[str, ...]] = {}
    for linear, entering in sub.linears:
        readers[entering] = (*readers.get(entering, ()), f"{linear}.kernel")
    return readers


@partial(jax.jit, static_argnames=("definition", "sub", "entering", "weighting"))
def gram(
    definition: BlockDefinition,
    sub: SubBlock,
    entering: str,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    stream: jax.Array,
    target: jax.Array,
    weighting: TokenWeighting,
) -> jax.Array:
    """G of an input of a sub-block's linears over a chunk of stream B, tokens weighted by `rebuild.token_weights`.

    Args:
        entering: which input.
        parameters: of the block, this sub-block's as they are now.
        masks: kernel path -> bool [out, in], of the sub-block.
        stream, target: [M, B, L, D].

    Returns:
        float32 [I, I].
    """
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, wanted = (constrain(each, DATA) for each in pair)
        seen = {}
        block.apply(sub.name, block.enter(sub.name, hidden), seen.__setitem__)
        flat = seen[entering].reshape(-1, seen[entering].shape[-1]).astype(jnp.float32)
        weights = token_weights(block, hidden, wanted, weighting)
        left = flat if weights is None else flat * weights.reshape(-1, 1)
        return constrain(total + jnp.matmul(left.T, flat, precision=lax.Precision.HIGHEST)), None

    size = dict(definition.shapes)[inputs(sub)[entering][0]][0]
    return lax.scan(micro_batch, jnp.zeros((size, size), jnp.float32), (stream, target))[0]


@jax.jit
def shrunk(gram: jax.Array, shrinkage: jax.Array) -> jax.Array:
    """G with more weight on its diagonal."""
    return gram + shrinkage * jnp.diag(jnp.diagonal(gram))


@jax.jit
def loss(kernel: jax.Array, dense: jax.Array, mask: jax.Array, gram: jax.Array) -> jax.Array:
    """Squared error, summed over tokens and outputs, of a kernel [I, O] under a mask [O, I] against the dense one's."""
    _, lost = errors(kernel.astype(jnp.float32).T, dense.astype(jnp.float32).T, mask, gram)
    return constrain(jnp.sum(lost))


def refined(
    kernel: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    fitted: jax.Array,
    judging: jax.Array,
    swaps: int,
    *,
    of: int,
) -> tuple[jax.Array, float] | None:
    """A matrix's mask, refined with every shrinkage: the best on other samples, or None where none is better there.

    Args:
        kernel: [I, O], as it is now; where pruned, the value a weight gets when revived. dense: [I, O], as it was.
        mask: bool [O, I].
        fitted: G to learn from. judging: that of other samples.
        swaps: at most so many for every output.
        of: M of an N:M pattern, 0: unstructured.

    Returns:
        bool [O, I] mask, the shrinkage it was found with.
    """
    least, best = float(loss(kernel, dense, mask, judging)), None
    for shrinkage in SHRINKAGES:
        new, _, _ = refine(kernel, dense, mask, shrunk(fitted, jnp.float32(shrinkage)), jnp.int32(swaps), of=of)
        lost = float(loss(kernel, dense, new, judging))
        if lost < least:
            least, best = lost, (new, shrinkage)
    return best
