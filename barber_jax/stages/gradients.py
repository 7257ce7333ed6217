"""Gradient importance of every weight of a sub-block (LLM-Barber, arXiv 2408.10631, equations 2 to 5).

For a sub-block f with dense weights W, starting weights W', starting mask m and input X_s of sample s (its real input:
a norm's output in pre-norm families):

    loss_s = mean over tokens and features of (f(W; X_s) - f(W' * m; X_s))^2           equation 2
    G_s    = d loss_s / d W, each sample by itself
    D      = sqrt(mean over s of G_s^2)
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, constrain, data_axis_size, kernel_axes
from barber_jax.stages.loss import TokenWeighting, error


@dataclass
class Totals:
    """Sums over samples, kept apart for each of the N groups of samples that are computed side by side.

    Attributes:
        squares: kernel path -> float32 [N, in, out], sums of squared gradients G_s^2.
        errors: float32 [N], sums of losses.
    """

    squares: dict[str, jax.Array]
    errors: jax.Array


jax.tree_util.register_dataclass(Totals, ["squares", "errors"], [])


def _constrain(sub: SubBlock, squares: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: constrain(square, DATA, *kernel_axes(sub, path)) for path, square in squares.items()}


@partial(jax.jit, static_argnames=("definition", "sub"))
def zero_totals(definition: BlockDefinition, sub: SubBlock) -> Totals:
    """Totals before the first sample."""
    shapes = dict(definition.shapes)
    squares = {path: jnp.zeros((data_axis_size(), *shapes[path]), jnp.float32) for path in sub.kernels}
    return Totals(_constrain(sub, squares), constrain(jnp.zeros(data_axis_size(), jnp.float32), DATA))


@partial(jax.jit, static_argnames=("definition", "sub", "weighting"), donate_argnames="totals")
def accumulate(
    definition: BlockDefinition,
    sub: SubBlock,
    parameters: Parameters,
    start: Parameters,
    masks: dict[str, jax.Array],
    stream: jax.Array,
    totals: Totals,
    weighting: TokenWeighting = "none",
) -> tuple[Totals, jax.Array]:
    """Add the squared gradients and the losses of a chunk's samples to the totals.

    Args:
        parameters: of the block, this sub-block's kernels dense.
        start: path -> starting weights where they differ from the dense ones: kernels [in, out], and the sub-block's
            biases and norms where they were trained.
        masks: kernel path -> bool [out, in] starting mask.
        stream: [M, B, L, D] hidden state that enters the sub-block.
        totals: of the samples before. Consumed.
        weighting: of tokens, see `loss.error`.

    Returns:
        totals: with these samples added.
        dense: [M, B, L, D], the dense outputs f(W; X_s).
    """
    kernels = {path: parameters[path].astype(jnp.float32) for path in sub.kernels}
    sparse = sparsify({**kernels, **start}, masks)

    def outcome(weights: Parameters, hidden: jax.Array) -> jax.Array:
        block = definition.bind({**parameters, **weights})
        return block.apply(sub.name, block.enter(sub.name, hidden))

    def sample(hidden: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Parameters]:
        target = outcome(sparse, hidden[None])

        def loss(kernels):
            dense = outcome(kernels, hidden[None])
            # The two are symmetric; tokens are weighted by the dense output, which does not change with the masks.
            return error(definition.bind(parameters), hidden[None], target, dense, weighting), dense[0]

        return jax.value_and_grad(loss, has_aux=True)(kernels)

    def side_by_side(totals: Totals, hidden: jax.Array) -> tuple[Totals, jax.Array]:
        (errors, dense), gradients = jax.vmap(sample)(constrain(hidden, DATA))
        squares = {path: totals.squares[path] + jnp.square(gradients[path]) for path in sub.kernels}
        return Totals(_constrain(sub, squares), constrain(totals.errors + errors, DATA)), constrain(dense, DATA)

    def micro_batch(totals: Totals, hidden: jax.Array) -> tuple[Totals, jax.Array]:
        # Each group takes consecutive samples: those that its devices hold already.
        grouped = hidden.reshape(data_axis_size(), -1, *hidden.shape[1:])
        totals, dense = lax.scan(side_by_side, totals, jnp.moveaxis(grouped, 1, 0))
        return totals, constrain(jnp.moveaxis(dense, 0, 1).reshape(hidden.shape), DATA)

    totals, dense = lax.scan(micro_batch, totals, stream)
    return totals, constrain(dense, None, DATA)


@partial(jax.jit, static_argnames="sub", donate_argnames="totals")
def importance(sub: SubBlock, totals: Totals, samples: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Gradient importance D of every weight of a sub-block, from the totals of all samples. Consumes `totals`.

    Returns:
        importance: kernel path -> float32 D [in, out].
        loss: mean of loss_s over samples.
    """
    root = {path: jnp.sqrt(jnp.sum(square, axis=0) / samples) for path, square in totals.squares.items()}
    root = {path: constrain(mean, *kernel_axes(sub, path)) for path, mean in root.items()}
    return root, constrain(jnp.sum(totals.errors) / samples)
