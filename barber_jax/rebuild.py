"""LLM-Barber itself (arXiv 2408.10631): the reconstruction loss of a sub-block, its gradient as importance, the swaps.

For a sub-block f with dense weights W, starting mask m and input X_s of sample s (its real input: a norm's output in
pre-norm families):

    loss_s = mean over tokens and features of (f(W; X_s) - f(W * m; X_s))^2            equation 2
    G_s    = d loss_s / d W, each sample by itself
    D      = sqrt(mean over s of G_s^2)
    score  = |W| * D                                                                   equation 5
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax import masks as selection
from barber_jax.config import SparsityPattern
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.passes import Parameters, sparsify


def _error(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared difference, float32."""
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))


@partial(jax.jit, static_argnames=("definition", "sub"))
def importance(
    definition: BlockDefinition,
    sub: SubBlock,
    parameters: Parameters,
    start: Parameters,
    masks: dict[str, jax.Array],
    stream: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Gradient importance of every weight of a sub-block, before the swap.

    Args:
        parameters: of the block, this sub-block's kernels dense.
        start: kernel path -> starting weights [in, out] where the criterion updated them.
        masks: kernel path -> bool [out, in] starting mask.
        stream: [M, B, L, D] hidden state that enters the sub-block.

    Returns:
        importance: kernel path -> float32 D [in, out].
        loss: mean of loss_s over samples.
        dense: [M, B, L, D], f(W; X_s), which the loss after the swap is measured against.
    """
    kernels = {path: parameters[path].astype(jnp.float32) for path in sub.kernels}

    sparse = sparsify({**kernels, **start}, masks)

    def outcome(kernels: Parameters, x: jax.Array) -> jax.Array:
        return definition.bind({**parameters, **kernels}).apply(sub.name, x)

    def sample(total, hidden):
        x = definition.bind(parameters).enter(sub.name, hidden[None])
        target = outcome(sparse, x)

        def loss(kernels):
            dense = outcome(kernels, x)
            return _error(dense, target), dense

        (error, dense), gradient = jax.value_and_grad(loss, has_aux=True)(kernels)
        squares, errors = total
        squares = jax.tree.map(lambda sum_, g: sum_ + jnp.square(g), squares, gradient)
        return (squares, errors + error), dense[0]

    samples = stream.reshape(-1, *stream.shape[2:])
    zeros = jax.tree.map(jnp.zeros_like, kernels)
    (squares, errors), dense = lax.scan(sample, (zeros, jnp.float32(0)), samples)
    count = samples.shape[0]
    root = jax.tree.map(lambda square: jnp.sqrt(square / count), squares)
    return root, errors / count, dense.reshape(stream.shape)


@jax.jit
def survivors(dense: Parameters, start: Parameters, masks: dict[str, jax.Array]) -> Parameters:
    """Weights that the score uses and that survive when the starting criterion's updates are retained: the updated
    weight where the starting mask keeps it, the dense one where a weight may be revived.

    Args:
        dense, start: kernel path -> [in, out]. masks: kernel path -> bool [out, in] starting mask.
    """
    return {path: jnp.where(masks[path].T, weight, dense[path]) for path, weight in start.items()}


@partial(jax.jit, static_argnames=("sub", "metric", "granularity", "pattern"))
def swap_masks(
    sub: SubBlock,
    weights: Parameters,
    importance: dict[str, jax.Array],
    masks: dict[str, jax.Array],
    alpha: jax.Array,
    *,
    metric: str,
    granularity: str,
    pattern: SparsityPattern,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The rebuilt masks of a sub-block.

    Args:
        weights: kernel path -> [in, out] weights that the score uses and that survive.
        importance: kernel path -> float32 D [in, out].
        masks: kernel path -> bool [out, in] starting mask.
        alpha: fraction of outlier pairs to swap.
        metric: `wd`, `w` or `d`.

    Returns:
        new masks, and for each the number of revived weights.
    """
    order = sub.kernels  # not the dictionaries' order: jit sorts their keys

    def score(path):
        weight, root = jnp.abs(weights[path].astype(jnp.float32)), importance[path]
        return {"wd": weight * root, "w": weight, "d": root}[metric].T

    scores, old = [score(path) for path in order], [masks[path] for path in order]
    if pattern.structured:
        pairs = zip(scores, old, strict=True)
        new = [selection.swap_n_of_m(s, m, alpha, pattern.keep, pattern.of) for s, m in pairs]
    else:
        new = selection.swap(scores, old, alpha, granularity)
    revived = [jnp.sum(n & ~o, dtype=jnp.int32) for n, o in zip(new, old, strict=True)]
    return dict(zip(order, new, strict=True)), dict(zip(order, revived, strict=True))


@partial(jax.jit, static_argnames=("definition", "sub"), donate_argnames="stream")
def advance(
    definition: BlockDefinition,
    sub: SubBlock,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    dense: jax.Array,
    stream: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Take the stream through a rebuilt sub-block. Consumes `stream`.

    Args:
        parameters: of the block, this sub-block's kernels as they survive.
        dense: [M, B, L, D] from `importance`.

    Returns:
        stream after the sub-block, and the mean over samples of its loss against `dense`.
    """
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(pair):
        hidden, target = pair
        y = block.apply(sub.name, block.enter(sub.name, hidden))
        # Samples have the same number of tokens, so the mean over all is the mean of the samples' means.
        return block.leave(sub.name, hidden, y), _error(y, target)

    stream, errors = lax.map(micro_batch, (stream, dense))
    return stream, jnp.mean(errors)
