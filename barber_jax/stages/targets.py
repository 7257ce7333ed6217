"""What a sub-block is to give on stream B, and how far it is from that.

Two targets for the output of a sub-block f on the hidden state H of stream B, in the shape of its output:

    same    f(W; H), the dense sub-block on the same inputs
    dense   H* + f(W; H*) - H, H* the dense model's state: with it the residual stream becomes the dense model's again,
            so that what earlier blocks lost is made up for as far as it can be
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.config import TokenWeighting
from barber_jax.devices.mesh import DATA, constrain
from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.stages.rebuild import error


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
        stream: [M, B, L, D], the same samples' state on stream B.

    Returns:
        dense stream after the sub-block, target; [M, B, L, D] each.
    """
    block = definition.bind(parameters)

    def micro_batch(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, hidden = (constrain(each, DATA) for each in pair)
        y = block.apply(sub.name, block.enter(sub.name, own))
        # The states are large and near each other, the target is small: float32 until they are subtracted.
        residual = own.astype(jnp.float32) + y.astype(jnp.float32)
        target = (residual - hidden.astype(jnp.float32)).astype(hidden.dtype)
        return constrain(block.leave(sub.name, own, y), DATA), constrain(target, DATA)

    after, target = lax.map(micro_batch, (dense_stream, stream))
    return constrain(after, None, DATA), constrain(target, None, DATA)


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
    """Sum over micro-batches of the sub-block's loss against its target.

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
