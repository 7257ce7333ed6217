"""LLM-Barber itself (arXiv 2408.10631): the reconstruction loss of a sub-block, its gradient as importance, the swaps.

For a sub-block f with dense weights W, starting mask m and input X_s of sample s (its real input: a norm's output in
pre-norm families):

    loss_s = mean over tokens and features of (f(W; X_s) - f(W * m; X_s))^2            equation 2
    G_s    = d loss_s / d W, each sample by itself
    D      = sqrt(mean over s of G_s^2)
    score  = |W| * D                                                                   equation 5
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.config import SparsityPattern, TokenWeighting
from barber_jax.devices.mesh import DATA, constrain, groups, kernel_axes, mask_axes
from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.masks import selection
from barber_jax.models.decoder import Block, BlockDefinition, SubBlock

LEAST_SPREAD = 1e-6
"""Added to a token's spread, as a norm adds its epsilon, so that a token of zeros has a finite weight."""


def token_weights(block: Block, hidden: jax.Array, y: jax.Array, weighting: TokenWeighting) -> jax.Array | None:
    """What a token's squared errors are multiplied by: float32 [S, L], or None where all tokens count alike.

    `norm` divides by the spread of the token's residual sum hidden + y ([S, L, D] each), which is what the next norm
    does to it. Nothing is differentiated through it.
    """
    if weighting == "none":
        return None
    residual = lax.stop_gradient(hidden.astype(jnp.float32) + y.astype(jnp.float32))
    return 1.0 / (block.spread(residual) + LEAST_SPREAD)


def error(block: Block, hidden: jax.Array, a: jax.Array, b: jax.Array, weighting: TokenWeighting) -> jax.Array:
    """Mean squared difference of a sub-block's outputs a and b, [S, L, D] each, float32; tokens weighted by
    `token_weights` of b, which is added to the residual stream `hidden` [S, L, D]."""
    squares = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
    weights = token_weights(block, hidden, b, weighting)
    return jnp.mean(squares if weights is None else squares * weights[..., None])


@dataclass
class Totals:
    """Sums over samples, kept apart for each of the N groups of samples that are computed side by side.

    Attributes:
        squares: kernel path -> float32 [N, in, out], squared gradients G_s^2.
        errors: float32 [N], losses.
    """

    squares: dict[str, jax.Array]
    errors: jax.Array


jax.tree_util.register_dataclass(Totals, ["squares", "errors"], [])


def _constrain(sub: SubBlock, squares: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: constrain(square, DATA, *kernel_axes(sub, path)) for path, square in squares.items()}


@partial(jax.jit, static_argnames=("definition", "sub"))
def no_totals(definition: BlockDefinition, sub: SubBlock) -> Totals:
    """Totals of no samples."""
    shapes = dict(definition.shapes)
    squares = {path: jnp.zeros((groups(), *shapes[path]), jnp.float32) for path in sub.kernels}
    return Totals(_constrain(sub, squares), constrain(jnp.zeros(groups(), jnp.float32), DATA))


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
    """Gradients and losses of the samples of a chunk of the stream, before the swap.

    Args:
        parameters: of the block, this sub-block's kernels dense.
        start: path -> starting weights where they are not the dense ones: kernels [in, out], and what was trained of
            the sub-block besides.
        masks: kernel path -> bool [out, in] starting mask.
        stream: [M, B, L, D] hidden state that enters the sub-block.
        totals: of the samples before. Consumed.
        weighting: of tokens, see `error`.

    Returns:
        totals: with these samples added.
        dense: [M, B, L, D], f(W; X_s), which the loss after the swap is measured against.
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
            # The two are symmetric; the weight is of the dense outcome, which does not change with the masks.
            return error(definition.bind(parameters), hidden[None], target, dense, weighting), dense[0]

        return jax.value_and_grad(loss, has_aux=True)(kernels)

    def side_by_side(totals: Totals, hidden: jax.Array) -> tuple[Totals, jax.Array]:
        (errors, dense), gradients = jax.vmap(sample)(constrain(hidden, DATA))
        squares = {path: totals.squares[path] + jnp.square(gradients[path]) for path in sub.kernels}
        return Totals(_constrain(sub, squares), constrain(totals.errors + errors, DATA)), constrain(dense, DATA)

    def micro_batch(totals: Totals, hidden: jax.Array) -> tuple[Totals, jax.Array]:
        # Each group takes consecutive samples: those that its devices hold already.
        grouped = hidden.reshape(groups(), -1, *hidden.shape[1:])
        totals, dense = lax.scan(side_by_side, totals, jnp.moveaxis(grouped, 1, 0))
        return totals, constrain(jnp.moveaxis(dense, 0, 1).reshape(hidden.shape), DATA)

    totals, dense = lax.scan(micro_batch, totals, stream)
    return totals, constrain(dense, None, DATA)


@partial(jax.jit, static_argnames="sub", donate_argnames="totals")
def importance(sub: SubBlock, totals: Totals, samples: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Gradient importance of every weight of a sub-block, from the totals of all samples. Consumes `totals`.

    Returns:
        importance: kernel path -> float32 D [in, out].
        loss: mean of loss_s over samples.
    """
    root = {path: jnp.sqrt(jnp.sum(square, axis=0) / samples) for path, square in totals.squares.items()}
    root = {path: constrain(mean, *kernel_axes(sub, path)) for path, mean in root.items()}
    return root, constrain(jnp.sum(totals.errors) / samples)


@jax.jit
def survivors(dense: Parameters, start: Parameters, masks: dict[str, jax.Array]) -> Parameters:
    """Weights that the score uses and that survive when the starting criterion's updates are retained: the updated
    weight where the starting mask keeps it, the dense one where a weight may be revived. What has no
    mask is as updated.

    Args:
        dense, start: path -> kernels [in, out] and other parameters.
        masks: kernel path -> bool [out, in] starting mask.
    """

    def survivor(path: str) -> jax.Array:
        return jnp.where(masks[path].T, start[path], dense[path]) if path in masks else start[path]

    return {path: survivor(path) for path in start}


@partial(jax.jit, static_argnames=("sub", "metric"))
def scores(sub: SubBlock, weights: Parameters, importance: dict[str, jax.Array], metric: str) -> dict[str, jax.Array]:
    """By what weights compete.

    Args:
        weights: kernel path -> [in, out] weights that survive.
        importance: kernel path -> float32 D [in, out].
        metric: `wd`, `w` or `d`.

    Returns:
        kernel path -> float32 [out, in].
    """

    def score(path: str) -> jax.Array:
        weight, root = jnp.abs(weights[path].astype(jnp.float32)), importance[path]
        return constrain({"wd": weight * root, "w": weight, "d": root}[metric].T, *mask_axes(sub, path))

    return {path: score(path) for path in sub.kernels}


def swap_masks(
    sub: SubBlock,
    scores: dict[str, jax.Array],
    masks: dict[str, jax.Array],
    alpha: jax.Array,
    *,
    granularity: str,
    pattern: SparsityPattern,
) -> dict[str, jax.Array]:
    """The rebuilt masks of a sub-block.

    Args:
        scores: kernel path -> float32 [out, in].
        masks: kernel path -> bool [out, in] starting mask.
        alpha: fraction of outlier pairs to swap.

    Returns:
        kernel path -> bool [out, in].
    """
    order = sub.kernels  # not the dictionaries' order: jit sorts their keys
    values, old = [scores[path] for path in order], [masks[path] for path in order]
    if pattern.structured:
        pairs = zip(values, old, strict=True)
        new = [selection.swap_n_of_m(s, m, alpha, pattern.keep, pattern.of) for s, m in pairs]
    else:
        new = selection.swap(values, old, alpha, granularity)
    return settled(sub, dict(zip(order, new, strict=True)))


@partial(jax.jit, static_argnames="sub")
def settled(sub: SubBlock, masks: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Masks where masks lie."""
    return {path: constrain(masks[path], *mask_axes(sub, path)) for path in sub.kernels}


@partial(jax.jit, static_argnames="sub")
def revived(sub: SubBlock, new: dict[str, jax.Array], old: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How many weights that the old masks prune the new ones keep: kernel path -> int32."""
    return {path: constrain(jnp.sum(new[path] & ~old[path], dtype=jnp.int32)) for path in sub.kernels}


OUTLIERS, BINS = 100, 16
"""One weight in OUTLIERS is an outlier of the metric; their places are counted in BINS x BINS parts of a matrix."""


@partial(jax.jit, static_argnames="sub")
def outlier_maps(
    sub: SubBlock, scores: dict[str, jax.Array], before: dict[str, jax.Array], after: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Where the masks of a sub-block prune outliers: the highest 1 % of a matrix's scores (figure 1b of the paper).

    Args:
        scores: kernel path -> float32 [out, in].
        before, after: kernel path -> bool [out, in] masks.

    Returns:
        kernel path -> int32 [2, BINS, BINS], how many outliers the two masks prune in each part, outputs by inputs.
    """

    def maps(path: str) -> jax.Array:
        score = scores[path]
        high = selection.keep_highest(score, score.size - score.size // OUTLIERS, selection.AXES["layer"])
        sides = [jnp.arange(size) * BINS // size for size in score.shape]
        outputs, inputs = (jnp.arange(BINS)[:, None] == side for side in sides)

        def count(flags: jax.Array) -> jax.Array:
            # Products of zeros and ones: exact in float32, as no part holds 2^24 outliers.
            return outputs.astype(jnp.float32) @ flags.astype(jnp.float32) @ inputs.T

        return constrain(jnp.stack([count(high & ~mask[path]) for mask in (before, after)]).astype(jnp.int32))

    return {path: maps(path) for path in sub.kernels}


@partial(jax.jit, static_argnames=("definition", "sub", "weighting"), donate_argnames="stream")
def advance(
    definition: BlockDefinition,
    sub: SubBlock,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    dense: jax.Array,
    stream: jax.Array,
    weighting: TokenWeighting = "none",
) -> tuple[jax.Array, jax.Array]:
    """Take the stream through a rebuilt sub-block. Consumes `stream`.

    Args:
        parameters: of the block, this sub-block's kernels as they survive.
        dense: [M, B, L, D] from `accumulate`.

    Returns:
        stream after the sub-block, and the sum over micro-batches of its loss against `dense`. Samples have the same
        number of tokens, so a micro-batch's loss is the mean of its samples'.
    """
    block = definition.bind(sparsify(parameters, masks))

    def micro_batch(total, pair):
        hidden, target = constrain(pair[0], DATA), pair[1]
        y = block.apply(sub.name, block.enter(sub.name, hidden))
        return total + error(block, hidden, y, target, weighting), constrain(block.leave(sub.name, hidden, y), DATA)

    total, stream = lax.scan(micro_batch, jnp.float32(0), (stream, dense))
    return constrain(stream, None, DATA), constrain(total)
