"""The reconstruction loss of a sub-block: how tokens are weighted in it, and how it is measured.

For the output y of a sub-block on the hidden state H of stream B, and its target t:

    loss = mean over tokens and features of w (y - t)^2

with w = 1 (the paper's, equation 2) or, under `norm` weighting, one over what the next norm divides the token's
residual sum H + t by, squared.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.models.decoder import Block, BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, constrain

TokenWeighting = Literal["none", "norm"]

MIN_SPREAD = 1e-6
"""Added to a token's spread, as a norm adds its epsilon, so that a token of zeros has a finite weight."""


def token_weights(block: Block, hidden: jax.Array, y: jax.Array, weighting: TokenWeighting) -> jax.Array | None:
    """Weight of each token's squared errors, float32 [S, L], or None where all tokens count alike.

    `norm` divides by the spread of the token's residual sum hidden + y ([S, L, D] each): its mean square before an
    RMSNorm, its variance before a LayerNorm. No gradient flows through the weights.
    """
    if weighting == "none":
        return None
    residual = lax.stop_gradient(hidden.astype(jnp.float32) + y.astype(jnp.float32))
    return 1.0 / (block.norm_variance(residual) + MIN_SPREAD)


def error(block: Block, hidden: jax.Array, a: jax.Array, b: jax.Array, weighting: TokenWeighting) -> jax.Array:
    """Mean squared difference of two outputs a and b of a sub-block, [S, L, D] each, as a float32 scalar.

    Tokens are weighted by `token_weights` of b, which is added to the residual stream `hidden` [S, L, D].
    """
    squares = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
    weights = token_weights(block, hidden, b, weighting)
    return jnp.mean(squares if weights is None else squares * weights[..., None])


@partial(jax.jit, static_argnames=("definition", "sub", "weighting"))
def loss(
    definition: BlockDefinition,
    sub: SubBlock,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    stream: jax.Array,
    target: jax.Array,
    weighting: TokenWeighting,
) -> jax.Array:
    """Sum over micro-batches of the sub-block's loss against its target, a float32 scalar.

    Args:
        parameters: of the block, this sub-block's kernels as they survive.
        masks: kernel path -> bool [out, in], of the sub-block.
        stream, target: [M, B, L, D].
    """
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, wanted = (constrain(each, DATA) for each in pair)
        y = block.apply(sub.name, block.enter(sub.name, hidden))
        return total + error(block, hidden, y, wanted, weighting), None

    return constrain(lax.scan(micro_batch, jnp.float32(0), (stream, target))[0])


@partial(jax.jit, static_argnames=("definition", "sub", "weighting"), donate_argnames="stream")
def advance(
    definition: BlockDefinition,
    sub: SubBlock,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    target: jax.Array,
    stream: jax.Array,
    weighting: TokenWeighting = "none",
) -> tuple[jax.Array, jax.Array]:
    """Propagate the stream through a finished sub-block and measure its loss on the way. Consumes `stream`.

    Args:
        parameters: of the block, this sub-block's kernels as they survive.
        masks: kernel path -> bool [out, in], of the sub-block.
        target, stream: [M, B, L, D].

    Returns:
        The stream after the sub-block, and the sum over micro-batches of its loss. Samples have the same number of
        tokens, so a micro-batch's loss is the mean of its samples'.
    """
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total, pair):
        hidden, wanted = constrain(pair[0], DATA), pair[1]
        y = block.apply(sub.name, block.enter(sub.name, hidden))
        return total + error(block, hidden, y, wanted, weighting), constrain(block.leave(sub.name, hidden, y), DATA)

    total, stream = lax.scan(micro_batch, jnp.float32(0), (stream, target))
    return constrain(stream, None, DATA), constrain(total)
