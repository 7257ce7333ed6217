"""Exact selection on device: k lowest or highest of every group, N:M groups, and swaps. No model in sight.

A mask is a bool [O, I] array, True = kept. Scores are non-negative float32. A *comparison group* is a set of weights
that compete: one output, one input, one matrix, or all matrices of a sub-block. Ties always go to the lower flat index
(matrices in the given order, C order within each).

Nothing is sorted. The bit pattern of a non-negative float32, read as an integer, has the float's order, so the k-th
value of a group is found by bisecting on that integer and counting. Counts are plain reductions: they cost the same
for every granularity, and stay correct when a group spans devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Arrays = list[jax.Array]

AXES: dict[str, tuple[int, ...]] = {"output1": (1,), "input1": (0,), "layer": (0, 1), "block": (0, 1)}
"""Granularity -> the axes of [O, I] that a comparison group spans; `block` spans all matrices as well."""

MOST = jnp.iinfo(jnp.int32).max


def _keys(scores: jax.Array) -> jax.Array:
    """Non-negative float32 -> int32 of the same order. abs() turns -0.0 into 0.0, whose bits would sort last."""
    return lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)


def _count(flags: Sequence[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """How many flags are set in each group, int32, axes kept."""
    return sum(jnp.sum(flag, axis=axes, keepdims=True, dtype=jnp.int32) for flag in flags)


def _bisect(low: jax.Array, high: jax.Array, enough) -> jax.Array:
    """Smallest integer x of [low, high] for which enough(x); enough(high) is taken to hold. Elementwise."""

    def narrow(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        yes = enough(middle)
        return jnp.where(yes | (low >= high), low, middle + 1), jnp.where(yes, middle, high)

    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), narrow, (low, high))[1]


def _lowest(keys: Arrays, among: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """Flags for the k lowest keys of every group among the flagged entries, ties to the lower flat index."""
    zero = jnp.zeros_like(_count(among, axes))
    k = jnp.broadcast_to(k, zero.shape)
    threshold = _bisect(
        zero,
        jnp.full_like(zero, MOST),
        lambda at: _count([a & (key <= at) for key, a in zip(keys, among, strict=True)], axes) >= k,
    )
    below = [a & (key < threshold) for key, a in zip(keys, among, strict=True)]
    ties = [a & (key == threshold) for key, a in zip(keys, among, strict=True)]
    wanted = k - _count(below, axes)

    def break_ties(ties: Arrays) -> Arrays:
        order = _flat_indices(ties)
        last = _bisect(
            zero,
            jnp.full_like(zero, sum(tie.size for tie in ties)),
            lambda at: _count([tie & (o <= at) for tie, o in zip(ties, order, strict=True)], axes) >= wanted,
        )
        return [tie & (o <= last) & (wanted > 0) for tie, o in zip(ties, order, strict=True)]

    # Ties are rare: usually the threshold is one weight's value, which is wanted, and there is nothing to break.
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


def keep_highest(scores: jax.Array, prune: int, axes: tuple[int, ...]) -> jax.Array:
    """Mask that prunes exactly the `prune` lowest scores of every group.

    Args:
        scores: non-negative float32 [O, I].
        prune: how many to prune in each group.
        axes: what a group spans, see `AXES`.

    Returns:
        bool [O, I], True = kept.
    """
    everything = jnp.ones(scores.shape, bool)
    return ~_lowest([_keys(scores)], [everything], jnp.int32(prune), axes)[0]


def lowest_through(scores: jax.Array, index: int) -> jax.Array:
    """Flags for every score at or below the value at `index` of the ascending scores of the whole array.

    Args:
        scores: non-negative float32, two axes.
        index: in [0, size).

    Returns:
        bool of the same shape, at least index + 1 flags set.
    """
    keys = _keys(scores)
    threshold = _bisect(jnp.int32(0), jnp.int32(MOST), lambda at: jnp.sum(keys <= at, dtype=jnp.int32) > index)
    return keys <= threshold


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


def count_swaps(metric: Arrays, masks: Arrays, alpha: float, axes: tuple[int, ...]) -> jax.Array:
    """How many pairs each group swaps: floor(float32(R) * float32(alpha)), arXiv 2408.10631, section 3.3.

    With the pruned weights' metric sorted descending (g) and the kept weights' ascending (p), R counts the i with
    g_i > p_i. The differences fall, so R is the largest r for which some value t has r pruned weights above it and r
    kept weights at or below it: R = max over t of min(#pruned > t, #kept <= t), where the two counts cross.

    Returns:
        int32, one number a group, axes kept.
    """
    keys = [_keys(m) for m in metric]

    def above(at):
        return _count([~mask & (key > at) for key, mask in zip(keys, masks, strict=True)], axes)

    def below(at):
        return _count([mask & (key <= at) for key, mask in zip(keys, masks, strict=True)], axes)

    zero = jnp.zeros_like(_count(masks, axes))
    cross = _bisect(zero, jnp.full_like(zero, MOST), lambda at: below(at) >= above(at))
    outliers = jnp.maximum(above(cross), jnp.where(cross > 0, below(cross - 1), 0))
    # float32(R) may round up to more than R when R > 2^24.
    swaps = jnp.floor(outliers.astype(jnp.float32) * jnp.float32(alpha)).astype(jnp.int32)
    return jnp.minimum(swaps, outliers)


def swap(metric: Arrays, masks: Arrays, alpha: float, granularity: str) -> Arrays:
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


def _revived(metric: Arrays, masks: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    return _lowest([MOST - _keys(m) for m in metric], [~mask for mask in masks], k, axes)


def _swap_group(metric: Arrays, masks: Arrays, alpha: float, axes: tuple[int, ...]) -> Arrays:
    k = count_swaps(metric, masks, alpha, axes)
    revived = _revived(metric, masks, k, axes)
    pruned = _lowest([_keys(m) for m in metric], masks, k, axes)
    return [(mask | r) & ~p for mask, r, p in zip(masks, revived, pruned, strict=True)]


def swap_n_of_m(metric: jax.Array, mask: jax.Array, alpha: float, keep: int, of: int) -> jax.Array:
    """New N:M mask of one matrix: k swaps for each output as in `swap`; a group of M then loses as many of the weights
    it kept before, lowest metric first, as it revived.

    A group cannot revive more than the N it kept (possible when N < M / 2); its best N are revived then, so that
    the pattern stays exact.

    Args:
        metric: non-negative float32 [O, I]. mask: bool [O, I] that keeps N of every M.
    """
    k = count_swaps([metric], [mask], alpha, AXES["output1"])
    revived = _revived([metric], [mask], k, AXES["output1"])[0]
    grouped = (mask.shape[0], -1, of)
    keys, kept, revived = _keys(metric).reshape(grouped), mask.reshape(grouped), revived.reshape(grouped)
    revived &= _rank(MOST - keys, revived) < keep
    lost = kept & (_rank(keys, kept) < jnp.sum(revived, axis=-1, keepdims=True))
    return ((kept | revived) & ~lost).reshape(mask.shape)
