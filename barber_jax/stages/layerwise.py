"""Layer-wise error of a linear, from the Gram matrix of its input.

For a linear with input X [tokens, I] on stream B, under the weights that the sub-block has by then, G = X^T X. The
error of an output whose dense weights d became v is (v - d)^T G (v - d).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.forward.streams import Stream
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, constrain
from barber_jax.stages.base import Work
from barber_jax.stages.exact_swaps import errors
from barber_jax.stages.loss import TokenWeighting, token_weights


def inputs(sub: SubBlock) -> dict[str, tuple[str, ...]]:
    """The distinct inputs of a sub-block's linears, in order -> kernel paths that read it."""
    readers: dict[str, tuple[str, ...]] = {}
    for linear, entering in sub.linears:
        readers[entering] = (*readers.get(entering, ()), f"{linear}.kernel")
    return readers


def gram(*arguments: Any) -> jax.Array:
    """The Gram matrix of `equations` alone, float32 [I, I]; arguments as there."""
    return equations(*arguments, lacking=False)[0]


@partial(jax.jit, static_argnames=("definition", "sub", "entering", "weighting", "lacking"))
def equations(
    definition: BlockDefinition,
    sub: SubBlock,
    entering: str,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    stream: jax.Array,
    target: jax.Array,
    weighting: TokenWeighting,
    given: jax.Array | None = None,
    *,
    lacking: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Gram matrix of an input of a sub-block's linears over a chunk of stream B, tokens weighted by
    `loss.token_weights`, or as given; and the product of the input with what the sub-block's output lacks.

    Args:
        entering: name of the input.
        parameters: of the block, this sub-block's as they are now.
        masks: kernel path -> bool [out, in], of the sub-block.
        stream, target: [M, B, L, D].
        given: float32 [M, B, L], weight of each token instead of those by `weighting`.
        lacking: whether the product is wanted.

    Returns:
        X^T X, float32 [I, I]; and X^T (target - output), float32 [I, D], or None.
    """
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total: tuple, pieces: tuple[jax.Array, ...]) -> tuple[tuple, None]:
        hidden, wanted, *own = (constrain(each, DATA) for each in pieces)
        seen = {}
        y = block.apply(sub.name, block.enter(sub.name, hidden), seen.__setitem__)
        flat = seen[entering].reshape(-1, seen[entering].shape[-1]).astype(jnp.float32)
        weights = own[0] if own else token_weights(block, hidden, wanted, weighting)
        left = flat if weights is None else flat * weights.reshape(-1, 1)
        rest = (wanted.astype(jnp.float32) - y.astype(jnp.float32)).reshape(-1, y.shape[-1])
        others = (flat, rest) if lacking else (flat,)
        products = (jnp.matmul(left.T, other, precision=lax.Precision.HIGHEST) for other in others)
        return tuple(constrain(sum_ + product) for sum_, product in zip(total, products, strict=True)), None

    size = dict(definition.shapes)[inputs(sub)[entering][0]][0]
    widths = (size, target.shape[-1]) if lacking else (size,)
    pieces = (stream, target) if given is None else (stream, target, given)
    sums = lax.scan(micro_batch, tuple(jnp.zeros((size, width), jnp.float32) for width in widths), pieces)[0]
    return sums if lacking else (*sums, None)


def summed(
    work: Work, entering: str, part: slice, given: Stream | None = None, *, lacking: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """`equations` of a sub-block on its way through the stages, summed over some chunks of its streams.

    Args:
        part: of the chunks.
        given: float32 stream [M, B, L], weights of the tokens instead of those by `--token-weighting`.
    """
    total, parameters = None, work.parameters
    chunks, targets = work.streams.rebuilt.part(part), work.target.part(part)
    weights = given.part(part) if given else [None] * len(chunks)
    for chunk, wanted, own in zip(chunks, targets, weights, strict=True):
        arguments = (work.definition, work.sub, entering, parameters, work.masks, chunk, wanted)
        found = equations(*arguments, work.options.token_weighting, own, lacking=lacking)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


@jax.jit
def shrunk(gram: jax.Array, shrinkage: jax.Array) -> jax.Array:
    """G + s diag(G): shrinks the correlations between inputs."""
    return gram + shrinkage * jnp.diag(jnp.diagonal(gram))


@jax.jit
def loss(kernel: jax.Array, dense: jax.Array, mask: jax.Array, gram: jax.Array) -> jax.Array:
    """Squared error, summed over tokens and outputs, of a kernel [I, O] under a mask [O, I] against the dense
    kernel."""
    _, lost = errors(kernel.astype(jnp.float32).T, dense.astype(jnp.float32).T, mask, gram)
    return constrain(jnp.sum(lost))
