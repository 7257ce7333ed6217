"""The target of a sub-block on stream B: the output that its pruned weights should give.

Two targets for the output of a sub-block f on the hidden state H of stream B, [M, B, L, D] like H:

    same    f(W; H), the dense sub-block on the same inputs
    dense   H* + f(W; H*) - H, with H* the dense model's hidden state: a sub-block that met it would bring the residual
            stream back to the dense model's, making up for what earlier blocks lost
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.forward.passes import Parameters
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, constrain

Target = Literal["same", "dense"]


@partial(jax.jit, static_argnames=("definition", "sub"))
def same(definition: BlockDefinition, sub: SubBlock, parameters: Parameters, stream: jax.Array) -> jax.Array:
    """f(W; H) for a chunk of stream B, [M, B, L, D] -> [M, B, L, D]; `parameters` of the dense block."""
    block = definition.bind(parameters)

    def micro_batch(hidden: jax.Array) -> jax.Array:
        return constrain(block.apply(sub.name, block.enter(sub.name, constrain(hidden, DATA))), DATA)

    return constrain(lax.map(micro_batch, stream), None, DATA)


@partial(jax.jit, static_argnames=("definition", "sub"), donate_argnames="dense_stream")
def dense(
    definition: BlockDefinition, sub: SubBlock, parameters: Parameters, dense_stream: jax.Array, stream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The `dense` target for a chunk of stream B, and the dense model's stream after the sub-block.

    Args:
        parameters: of the dense block.
        dense_stream: [M, B, L, D]. Consumed.
        stream: [M, B, L, D], stream B for the same samples.

    Returns:
        dense stream after the sub-block, target; [M, B, L, D] each.
    """
    block = definition.bind(parameters)

    def micro_batch(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, hidden = (constrain(each, DATA) for each in pair)
        y = block.apply(sub.name, block.enter(sub.name, own))
        # The two states are large and close to each other, the target is small: float32 until they are subtracted.
        residual = own.astype(jnp.float32) + y.astype(jnp.float32)
        target = (residual - hidden.astype(jnp.float32)).astype(hidden.dtype)
        return constrain(block.leave(sub.name, own, y), DATA), constrain(target, DATA)

    after, target = lax.map(micro_batch, (dense_stream, stream))
    return constrain(after, None, DATA), constrain(target, None, DATA)
