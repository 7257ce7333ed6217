"""Gradients of a whole decoder block: how much each of its kernels matters to what the block puts out.

For a criterion whose score asks for it. For the dense block f, sample s and a loss of its output alone:

    G = sqrt(mean over s of (d loss(f(H_s)) / d W)^2)            each sample by itself
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.mesh import DATA, constrain, constrain_kernels, groups, parameter_axes
from barber_jax.models.decoder import BlockDefinition
from barber_jax.passes import Parameters


def _constrain(definition: BlockDefinition, squares: Parameters) -> Parameters:
    axes = parameter_axes(definition.sub_blocks)
    return {path: constrain(square, DATA, *axes[path]) for path, square in squares.items()}


def _kernels(definition: BlockDefinition) -> list[str]:
    return [path for sub in definition.sub_blocks for path in sub.kernels]


@partial(jax.jit, static_argnames="definition")
def no_squares(definition: BlockDefinition) -> Parameters:
    """Squares of no samples: kernel path -> float32 [N, in, out], apart for each of the N groups of samples that are
    computed side by side."""
    shapes = dict(definition.shapes)
    squares = {path: jnp.zeros((groups(), *shapes[path]), jnp.float32) for path in _kernels(definition)}
    return _constrain(definition, squares)


@partial(jax.jit, static_argnames=("definition", "loss"), donate_argnames="squares")
def accumulate(
    definition: BlockDefinition,
    loss: Callable[[jax.Array], jax.Array],
    parameters: Parameters,
    stream: jax.Array,
    squares: Parameters,
) -> Parameters:
    """Squared gradients of the samples of a chunk of the stream.

    Args:
        loss: a sample's output [L, D] -> float32 scalar.
        parameters: of the block, dense.
        stream: [M, B, L, D] hidden state that enters the block.
        squares: of the samples before. Consumed.

    Returns:
        squares with these samples' added.
    """
    kernels = {path: parameters[path].astype(jnp.float32) for path in _kernels(definition)}

    def sample(hidden: jax.Array) -> Parameters:
        return jax.grad(lambda kernels: loss(definition.run({**parameters, **kernels}, hidden[None])[0]))(kernels)

    def side_by_side(squares: Parameters, hidden: jax.Array) -> tuple[Parameters, None]:
        gradients = jax.vmap(sample)(constrain(hidden, DATA))
        more = {path: square + jnp.square(gradients[path]) for path, square in squares.items()}
        return _constrain(definition, more), None

    def micro_batch(squares: Parameters, hidden: jax.Array) -> tuple[Parameters, None]:
        # Each group takes consecutive samples: those that its devices hold already.
        grouped = hidden.reshape(groups(), -1, *hidden.shape[1:])
        return lax.scan(side_by_side, squares, jnp.moveaxis(grouped, 1, 0))

    return lax.scan(micro_batch, squares, stream)[0]


@partial(jax.jit, static_argnames="definition", donate_argnames="squares")
def root_mean(definition: BlockDefinition, squares: Parameters, samples: jax.Array) -> Parameters:
    """G: kernel path -> float32 [in, out], from the squares of all samples, which are consumed."""
    root = {path: jnp.sqrt(jnp.sum(square, axis=0) / samples) for path, square in squares.items()}
    for sub in definition.sub_blocks:
        root |= constrain_kernels(sub, {path: root[path] for path in sub.kernels})
    return root
