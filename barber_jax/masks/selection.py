"""Selects weights by score, exactly and on the device: the k lowest of every comparison group, N:M groups, and swaps.

A mask is a bool [O, I] array (outputs, inputs), True = kept. Scores are non-negative float32. A *comparison group* is
a set of weights that compete: one output, one input, one matrix, or all matrices of a sub-block. Ties always go to the
lower flat index (matrices in the given order, C order within each).

Nothing is sorted. The bits of a non-negative float32, read as an integer, have the same order as the float, so the
k-th value of a group is found by bisecting on that integer and counting. Counts are plain reductions: they cost the
same for every granularity, and remain correct when a group is sharded over devices.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Arrays = list[jax.Array]

AXES: dict[str, tuple[int, ...]] = {"output1": (1,), "input1": (0,), "layer": (0, 1), "block": (0, 1)}
"""Granularity -> axes of [O, I] that a comparison group spans; a `block` group also spans all matrices."""

INFINITY_KEY = 0x7F800000
"""Key of infinity, above the key of every finite score."""
EXCLUDED_KEY = jnp.iinfo(jnp.int32).max
"""Key above that of every score, for entries that must not be selected."""


def _keys(scores: jax.Array) -> jax.Array:
    """Map non-negative float32 to int32 keys of the same order. abs() clears the sign bit of -0.0."""
    return lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)


def _restrict(keys: Arrays, flags: Arrays) -> Arrays:
    """Replace the keys of entries that are not flagged with EXCLUDED_KEY."""
    return [jnp.where(flag, key, EXCLUDED_KEY) for key, flag in zip(keys, flags, strict=True)]


def _count(flags: Sequence[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """Number of set flags in each group, int32; the reduced axes are kept with size 1."""
    inner, *outer = sorted(axes, reverse=True)
    # One axis is summed in float32, which is exact below 2^24 entries and twice as fast on CPU.
    counts = [jnp.sum(flag, axis=inner, keepdims=True, dtype=jnp.float32).astype(jnp.int32) for flag in flags]
    return sum(jnp.sum(count, axis=tuple(outer), keepdims=True) for count in counts)


def _count_at_most(keys: Arrays, bound: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Number of keys in each group that are at most the group's bound."""
    return _count([key <= bound for key in keys], axes)


def _threshold(keys: Arrays, k: jax.Array, axes: tuple[int, ...], top: int = INFINITY_KEY) -> jax.Array:
    """For each group, find a bound such that exactly k of its keys are at or below it.

    Where ties make that impossible, it is the smallest bound with at least k keys at or below it, or `top` if the group
    has fewer than k keys. Keys are in [0, top].
    """

    def narrow(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        count = _count_at_most(keys, middle, axes)
        # Once a group's count is exactly k, set both ends to `middle`, which ends its search.
        up = jnp.where((low >= high) | (count > k), low, jnp.where(count == k, middle, middle + 1))
        return up, jnp.where(count >= k, middle, high)

    zero = jnp.zeros_like(k)
    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), narrow, (zero, jnp.full_like(k, top)))[1]


def _lowest(keys: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """Flag the k lowest keys of every group; ties go to the lower flat index."""
    threshold = _threshold(keys, k, axes)
    below = [key < threshold for key in keys]
    ties = [key == threshold for key in keys]
    needed = k - _count(below, axes)

    def break_ties(ties: Arrays) -> Arrays:
        order = _restrict(_flat_indices(ties), ties)
        last = _threshold(order, needed, axes, top=sum(tie.size for tie in ties))
        return [(o <= last) & (needed > 0) for o in order]

    # Usually all keys at the threshold are needed, and there is no tie to break.
    chosen = lax.cond(jnp.all(_count(ties, axes) == needed), lambda ties: ties, break_ties, ties)
    return [b | c for b, c in zip(below, chosen, strict=True)]


def _flat_indices(arrays: Arrays) -> Arrays:
    """int32 positions in the concatenation of the flattened arrays, in each array's shape."""
    out, start = [], 0
    for array in arrays:
        rows = lax.broadcasted_iota(jnp.int32, array.shape, 0)
        columns = lax.broadcasted_iota(jnp.int32, array.shape, 1)
        out.append(start + rows * array.shape[1] + columns)
        start += array.size
    return out


def keep_highest(scores: jax.Array, prune: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Build the mask that prunes exactly the `prune` lowest scores of every comparison group.

    Args:
        scores: non-negative float32 [O, I].
        prune: number of weights to prune in each group.
        axes: axes that a group spans; see `AXES`.

    Returns:
        bool [O, I], True = kept.
    """
    keys = [_keys(scores)]
    return ~_lowest(keys, jnp.full_like(_count(keys, axes), prune), axes)[0]


def lowest_with_ties(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Flag the `count` lowest scores of the whole array, and all scores that tie with the highest of them.

    Args:
        scores: non-negative float32, two axes.
        count: in [0, size]; 0 flags nothing.

    Returns:
        bool of the same shape.
    """
    keys, axes = _keys(scores), AXES["layer"]
    return (keys <= _threshold([keys], jnp.full((1, 1), count), axes)) & (count > 0)


def _rank(keys: jax.Array, among: jax.Array) -> jax.Array:
    """int32 rank of each entry among the flagged entries of its last axis: lowest key first, ties to the lower index.

    Entries are compared pairwise: sorting is slow for very many groups of few entries.
    """
    index = jnp.arange(keys.shape[-1])
    mine, other = keys[..., :, None], keys[..., None, :]
    before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return jnp.sum(before & among[..., None, :], axis=-1, dtype=jnp.int32)


def keep_n_of_m(scores: jax.Array, keep: int, of: int) -> jax.Array:
    """Build the mask that keeps the N highest scores of every M consecutive inputs of an output.

    Args:
        scores: non-negative float32 [O, I], I a multiple of M.
        keep, of: N and M.

    Returns:
        bool [O, I], True = kept.
    """
    grouped = _keys(scores).reshape(scores.shape[0], -1, of)
    return (_rank(grouped, jnp.ones(grouped.shape, bool)) >= of - keep).reshape(scores.shape)


@partial(jax.jit, static_argnames="axes")
def count_swaps(metric: Arrays, masks: Arrays, alpha: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Number of swaps in each group: floor(float32(R) * float32(alpha)), arXiv 2408.10631, section 3.3.

    With the pruned weights' metric sorted in descending order (g) and the kept weights' in ascending order (p), R is
    the number of i with g_i > p_i. Since g_i - p_i decreases with i, R is the largest r for which some value t has r
    pruned weights above it and r kept weights at or below it: R = max over t of min(#pruned > t, #kept <= t). As t
    grows the first count falls and the second rises; they are equal where the number of all weights at or below t is
    the number of pruned weights.

    Args:
        metric: per matrix, non-negative float32 [O, I].
        masks: per matrix, bool [O, I], True = kept.
        alpha: fraction of the R pairs to swap, in [0, 1].
        axes: axes that a group spans, besides all given matrices; see `AXES`.

    Returns:
        int32, one number per group; the reduced axes are kept with size 1.
    """
    keys = [_keys(m) for m in metric]
    total = _count([~mask for mask in masks], axes)
    cross = _threshold(keys, total, axes)

    def count_at_most(bound: jax.Array, kind: Arrays) -> jax.Array:
        return _count([flag & (key <= bound) for flag, key in zip(kind, keys, strict=True)], axes)

    above = total - count_at_most(cross, [~mask for mask in masks])
    # With `cross` = 0, the second count is 0, since no key is negative.
    outliers = jnp.maximum(above, count_at_most(cross - 1, masks))
    # float32(R) may round up to more than R when R > 2^24.
    swaps = jnp.floor(outliers.astype(jnp.float32) * jnp.float32(alpha)).astype(jnp.int32)
    return jnp.minimum(swaps, outliers)


def swap(metric: Arrays, masks: Arrays, alpha: jax.Array, granularity: str) -> Arrays:
    """Swap weights in the masks of one sub-block (arXiv 2408.10631, section 3.3).

    In every comparison group, the pruned weights with the highest metric are regrown, and as many kept weights with
    the lowest metric are pruned. The sparsity of every group is exactly unchanged.

    Args:
        metric: per matrix, non-negative float32 [O, I].
        masks: per matrix, bool [O, I], True = kept.
        alpha: fraction of the outlier pairs to swap, in [0, 1].
        granularity: a key of `AXES`.

    Returns:
        The new masks, per matrix, bool [O, I].
    """
    if granularity != "block":
        return [_swap_group([m], [mask], alpha, AXES[granularity])[0] for m, mask in zip(metric, masks, strict=True)]
    return _swap_group(metric, masks, alpha, AXES[granularity])


# Three jitted programs and not one: the temporary arrays of each are several times as large as the weights, and they
# are only certain to be freed between programs.
@partial(jax.jit, static_argnames="axes")
def _select_regrown(metric: Arrays, masks: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """Flag the k pruned weights with the highest metric in every group."""
    return _lowest(_restrict([INFINITY_KEY - _keys(m) for m in metric], [~mask for mask in masks]), k, axes)


@partial(jax.jit, static_argnames="axes")
def _apply_swaps(metric: Arrays, masks: Arrays, regrown: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """New masks: the regrown weights are kept, and the k kept weights with the lowest metric in every group pruned."""
    pruned = _lowest(_restrict([_keys(m) for m in metric], masks), k, axes)
    return [(mask | r) & ~p for mask, r, p in zip(masks, regrown, pruned, strict=True)]


def _swap_group(metric: Arrays, masks: Arrays, alpha: jax.Array, axes: tuple[int, ...]) -> Arrays:
    k = count_swaps(metric, masks, alpha, axes)
    return _apply_swaps(metric, masks, _select_regrown(metric, masks, k, axes), k, axes)


@partial(jax.jit, static_argnames=("keep", "of"))
def swap_n_of_m(metric: jax.Array, mask: jax.Array, alpha: jax.Array, keep: int, of: int) -> jax.Array:
    """Swap weights in the N:M mask of one matrix, keeping the pattern.

    In each output, k weights are regrown as in `swap`. Each group of M then prunes as many of its previously kept
    weights, lowest metric first, as it regrew. A group cannot regrow more than the N weights it kept (which could
    happen when N < M / 2); only its N highest are then regrown, so that the pattern stays exact.

    Args:
        metric: non-negative float32 [O, I].
        mask: bool [O, I] that keeps N of every M.
        alpha: fraction of the outlier pairs to swap, in [0, 1].
        keep, of: N and M.

    Returns:
        The new mask, bool [O, I].
    """
    keys, axes = _keys(metric), AXES["output1"]
    k = count_swaps([metric], [mask], alpha, axes)
    regrown = _select_regrown([metric], [mask], k, axes)[0]
    grouped = (mask.shape[0], -1, of)
    keys, kept, regrown = keys.reshape(grouped), mask.reshape(grouped), regrown.reshape(grouped)
    regrown &= _rank(INFINITY_KEY - keys, regrown) < keep
    pruned = kept & (_rank(keys, kept) < jnp.sum(regrown, axis=-1, keepdims=True))
    return ((kept | regrown) & ~pruned).reshape(mask.shape)
