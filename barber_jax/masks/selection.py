"""Exact selection on device: k lowest or highest of every group, N:M groups, and swaps. No model in sight.

A mask is a bool [O, I] array, True = kept. Scores are non-negative float32. A *comparison group* is a set of weights
that compete: one output, one input, one matrix, or all matrices of a sub-block. Ties always go to the lower flat index
(matrices in the given order, C order within each).

Nothing is sorted. The bit pattern of a non-negative float32, read as an integer, has the float's order, so the k-th
value of a group is found by bisecting on that integer and counting. Counts are plain reductions: they cost the same
for every granularity, and stay correct when a group spans devices.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Arrays = list[jax.Array]

AXES: dict[str, tuple[int, ...]] = {"output1": (1,), "input1": (0,), "layer": (0, 1), "block": (0, 1)}
"""Granularity -> the axes of [O, I] that a comparison group spans; `block` spans all matrices as well."""

HIGHEST = 0x7F800000
"""The key of infinity, above that of every finite score."""
ABSENT = jnp.iinfo(jnp.int32).max
"""A key above every score's: an entry that takes no part."""


def _keys(scores: jax.Array) -> jax.Array:
    """Non-negative float32 -> int32 of the same order. abs() turns -0.0 into 0.0, whose bits would sort last."""
    return lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)


def _among(keys: Arrays, flags: Arrays) -> Arrays:
    """The keys of flagged entries; others take no part."""
    return [jnp.where(flag, key, ABSENT) for key, flag in zip(keys, flags, strict=True)]


def _count(flags: Sequence[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """How many flags are set in each group, int32, axes kept."""
    inner, *outer = sorted(axes, reverse=True)
    # Along one axis in float32, which is exact below 2^24 entries and twice as fast on a CPU.
    counts = [jnp.sum(flag, axis=inner, keepdims=True, dtype=jnp.float32).astype(jnp.int32) for flag in flags]
    return sum(jnp.sum(count, axis=tuple(outer), keepdims=True) for count in counts)


def _at_most(keys: Arrays, bound: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """How many keys of each group are at most the group's bound."""
    return _count([key <= bound for key in keys], axes)


def _threshold(keys: Arrays, k: jax.Array, axes: tuple[int, ...], top: int = HIGHEST) -> jax.Array:
    """For each group a bound that exactly k of its keys are at or below; where ties forbid that, the smallest that
    at least k are (`top` if there are fewer). Keys lie in [0, top]."""

    def narrow(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        count = _at_most(keys, middle, axes)
        # A group that has its k is done: both ends meet.
        up = jnp.where((low >= high) | (count > k), low, jnp.where(count == k, middle, middle + 1))
        return up, jnp.where(count >= k, middle, high)

    zero = jnp.zeros_like(k)
    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), narrow, (zero, jnp.full_like(k, top)))[1]


def _lowest(keys: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """Flags for the k lowest keys of every group, ties to the lower flat index."""
    threshold = _threshold(keys, k, axes)
    below = [key < threshold for key in keys]
    ties = [key == threshold for key in keys]
    wanted = k - _count(below, axes)

    def break_ties(ties: Arrays) -> Arrays:
        order = _among(_flat_indices(ties), ties)
        last = _threshold(order, wanted, axes, top=sum(tie.size for tie in ties))
        return [(o <= last) & (wanted > 0) for o in order]

    # Ties are rare: usually all at the threshold are wanted, and there is nothing to break.
    chosen = lax.cond(jnp.all(_count(ties, axes) == wanted), lambda ties: ties, break_ties, ties)
    return [b | c for b, c in zip(below, chosen, strict=True)]


def _flat_indices(arrays: Arrays) -> Arrays:
    """int32 positions in the concatenation of the flattened arrays, each of its array's shape."""
    out, start = [], 0
    for array in arrays:
        rows = lax.broadcasted_iota(jnp.int32, array.shape, 0)
        columns = lax.broadcasted_iota(jnp.int32, array.shape, 1)
        out.append(start + rows * array.shape[1] + columns)
        start += array.size
    return out


def keep_highest(scores: jax.Array, prune: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Mask that prunes exactly the `prune` lowest scores of every group.

    Args:
        scores: non-negative float32 [O, I].
        prune: how many to prune in each group.
        axes: what a group spans, see `AXES`.

    Returns:
        bool [O, I], True = kept.
    """
    keys = [_keys(scores)]
    return ~_lowest(keys, jnp.full_like(_count(keys, axes), prune), axes)[0]


def lowest_through(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Flags for the `count` lowest scores of the whole array and for those that tie with the highest of them.

    Args:
        scores: non-negative float32, two axes.
        count: in [0, size]; 0 flags nothing.

    Returns:
        bool of the same shape.
    """
    keys, axes = _keys(scores), AXES["layer"]
    return (keys <= _threshold([keys], jnp.full((1, 1), count), axes)) & (count > 0)


def _rank(keys: jax.Array, among: jax.Array) -> jax.Array:
    """int32 rank of every flagged entry among the flagged of its last axis, lowest key first, ties to the lower index.

    Pairwise comparison: groups have few entries and there are very many, where sorting each is slow.
    """
    index = jnp.arange(keys.shape[-1])
    mine, other = keys[..., :, None], keys[..., None, :]
    before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return jnp.sum(before & among[..., None, :], axis=-1, dtype=jnp.int32)


def keep_n_of_m(scores: jax.Array, keep: int, of: int) -> jax.Array:
    """Mask that keeps the N highest scores of every M consecutive inputs of an output.

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
    """How many pairs each group swaps: floor(float32(R) * float32(alpha)), arXiv 2408.10631, section 3.3.

    With the pruned weights' metric sorted descending (g) and the kept weights' ascending (p), R counts the i with
    g_i > p_i. The differences fall, so R is the largest r for which some value t has r pruned weights above it and r
    kept weights at or below it: R = max over t of min(#pruned > t, #kept <= t). The two counts cross where as many
    weights of both kinds are at or below t as there are pruned ones.

    Returns:
        int32, one number a group, axes kept.
    """
    keys = [_keys(m) for m in metric]
    total = _count([~mask for mask in masks], axes)
    cross = _threshold(keys, total, axes)

    def at_most(bound: jax.Array, kind: Arrays) -> jax.Array:
        return _count([flag & (key <= bound) for flag, key in zip(kind, keys, strict=True)], axes)

    above = total - at_most(cross, [~mask for mask in masks])
    # No key is below 0, so that at a crossing of 0 this counts none.
    outliers = jnp.maximum(above, at_most(cross - 1, masks))
    # float32(R) may round up to more than R when R > 2^24.
    swaps = jnp.floor(outliers.astype(jnp.float32) * jnp.float32(alpha)).astype(jnp.int32)
    return jnp.minimum(swaps, outliers)


def swap(metric: Arrays, masks: Arrays, alpha: jax.Array, granularity: str) -> Arrays:
    """New masks of one sub-block: in every comparison group the most important pruned weights replace the least
    important kept ones (arXiv 2408.10631, section 3.3). Sparsity of every group is unchanged exactly.

    Args:
        metric: per matrix, non-negative float32 [O, I].
        masks: per matrix, bool [O, I].
        alpha: fraction of the outlier pairs to swap, in [0, 1].
        granularity: a key of `AXES`.
    """
    if granularity != "block":
        return [_swap_group([m], [mask], alpha, AXES[granularity])[0] for m, mask in zip(metric, masks, strict=True)]
    return _swap_group(metric, masks, alpha, AXES[granularity])


# Three programs and not one: what each needs for a while is several times as large as the weights, and only between
# programs is it sure to be given back.
@partial(jax.jit, static_argnames="axes")
def _revived(metric: Arrays, masks: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """Flags for the k most important pruned weights of every group."""
    return _lowest(_among([HIGHEST - _keys(m) for m in metric], [~mask for mask in masks]), k, axes)


@partial(jax.jit, static_argnames="axes")
def _swapped(metric: Arrays, masks: Arrays, revived: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """New masks: without the k least important kept weights of every group, and with the revived."""
    lost = _lowest(_among([_keys(m) for m in metric], masks), k, axes)
    return [(mask | r) & ~p for mask, r, p in zip(masks, revived, lost, strict=True)]


def _swap_group(metric: Arrays, masks: Arrays, alpha: jax.Array, axes: tuple[int, ...]) -> Arrays:
    k = count_swaps(metric, masks, alpha, axes)
    return _swapped(metric, masks, _revived(metric, masks, k, axes), k, axes)


@partial(jax.jit, static_argnames=("keep", "of"))
def swap_n_of_m(metric: jax.Array, mask: jax.Array, alpha: jax.Array, keep: int, of: int) -> jax.Array:
    """New N:M mask of one matrix: k swaps for each output as in `swap`; a group of M then loses as many of the weights
    it kept before, lowest metric first, as it revived.

    A group cannot revive more than the N it kept (possible when N < M / 2); its best N are revived then, so that
    the pattern stays exact.

    Args:
        metric: non-negative float32 [O, I]. mask: bool [O, I] that keeps N of every M.
    """
    keys, axes = _keys(metric), AXES["output1"]
    k = count_swaps([metric], [mask], alpha, axes)
    revived = _revived([metric], [mask], k, axes)[0]
    grouped = (mask.shape[0], -1, of)
    keys, kept, revived = keys.reshape(grouped), mask.reshape(grouped), revived.reshape(grouped)
    revived &= _rank(HIGHEST - keys, revived) < keep
    lost = kept & (_rank(keys, kept) < jnp.sum(revived, axis=-1, keepdims=True))
    return ((kept | revived) & ~lost).reshape(mask.shape)
