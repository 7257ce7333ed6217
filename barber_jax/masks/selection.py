"""Selects weights by score, exactly and on the device: the k lowest of every comparison group, N:M groups, and swaps.

A mask is a bool [O, I] array (outputs, inputs), True = kept. Scores are non-negative float32. A *comparison group* is
a set of weights that compete: one output, one input, one matrix, or all matrices of a sub-block. Ties always go to the
lower flat index (matrices in the given order, C order within each).

There are two implementations, which select the same weights; `selector` says which one a matrix gets. Both compare the
bits of non-negative float32, which have the order of the floats when they are read as integers (`keys`).

- `count`: nothing is sorted. The k-th value of a group is found by bisecting on the integer and counting. Counts are
  plain reductions: they cost the same for every granularity, and remain correct when a group is sharded over devices.
- `top_k`: `jax.lax.top_k` puts every group in order (`top_k`). For groups along one axis alone: outputs, inputs and N:M
  groups. Matrices and sub-blocks are always counted.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.masks import top_k
from barber_jax.masks.keys import INFINITY_KEY, restrict, swaps_of_outliers, to_keys

Arrays = list[jax.Array]
Selection = Literal["top_k", "count"]
"""Implementation of the selection; the result is the same."""

AXES: dict[str, tuple[int, ...]] = {"output1": (1,), "input1": (0,), "layer": (0, 1), "block": (0, 1)}
"""Granularity -> axes of [O, I] that a comparison group spans; a `block` group also spans all matrices."""


def _restrict(keys: Arrays, flags: Arrays) -> Arrays:
    """`restrict` of every matrix."""
    return [restrict(key, flag) for key, flag in zip(keys, flags, strict=True)]


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


def _by_top_k(selection: Selection, axes: tuple[int, ...]) -> bool:
    """Whether groups that span the axes are selected with top_k."""
    return selection == "top_k" and len(axes) == 1


def _rows(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Move the one axis that a group spans to the end, or back."""
    return array if axes == (1,) else array.T


def keep_highest(
    scores: jax.Array, prune: int | jax.Array, axes: tuple[int, ...], selection: Selection = "count"
) -> jax.Array:
    """Build the mask that prunes exactly the `prune` lowest scores of every comparison group.

    Args:
        scores: non-negative float32 [O, I].
        prune: number of weights to prune in each group.
        axes: axes that a group spans; see `AXES`.
        selection: implementation.

    Returns:
        bool [O, I], True = kept.
    """
    keys = [to_keys(scores)]
    if _by_top_k(selection, axes):
        return _rows(~top_k.lowest(_rows(keys[0], axes), prune), axes)
    return ~_lowest(keys, jnp.full_like(_count(keys, axes), prune), axes)[0]


def lowest_with_ties(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Flag the `count` lowest scores of the whole array, and all scores that tie with the highest of them.

    Args:
        scores: non-negative float32, two axes.
        count: in [0, size]; 0 flags nothing.

    Returns:
        bool of the same shape.
    """
    keys, axes = to_keys(scores), AXES["layer"]
    return (keys <= _threshold([keys], jnp.full((1, 1), count), axes)) & (count > 0)


def _rank(keys: jax.Array, among: jax.Array) -> jax.Array:
    """int32 rank of each entry among the flagged entries of its last axis: lowest key first, ties to the lower index.

    Entries are compared pairwise: sorting is slow for very many groups of few entries.
    """
    index = jnp.arange(keys.shape[-1])
    mine, other = keys[..., :, None], keys[..., None, :]
    before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return jnp.sum(before & among[..., None, :], axis=-1, dtype=jnp.int32)


def _first(keys: jax.Array, among: jax.Array, k: int | jax.Array, selection: Selection) -> jax.Array:
    """Flag the k lowest keys among the flagged entries of each last axis, or all of these if they are fewer."""
    if selection == "count":
        return among & (_rank(keys, among) < k)
    return top_k.lowest(restrict(keys, among), jnp.minimum(k, jnp.sum(among, axis=-1, keepdims=True, dtype=jnp.int32)))


def keep_n_of_m(scores: jax.Array, keep: int, of: int, selection: Selection = "count") -> jax.Array:
    """Build the mask that keeps the N highest scores of every M consecutive inputs of an output.

    Args:
        scores: non-negative float32 [O, I], I a multiple of M.
        keep, of: N and M.
        selection: implementation.

    Returns:
        bool [O, I], True = kept.
    """
    grouped = to_keys(scores).reshape(scores.shape[0], -1, of)
    if selection == "top_k":
        return ~top_k.lowest(grouped, of - keep).reshape(scores.shape)
    return (_rank(grouped, jnp.ones(grouped.shape, bool)) >= of - keep).reshape(scores.shape)


@partial(jax.jit, static_argnames=("axes", "selection"))
def count_swaps(
    metric: Arrays, masks: Arrays, alpha: jax.Array, axes: tuple[int, ...], selection: Selection = "count"
) -> jax.Array:
    """Number of swaps in each group: floor(float32(R) * float32(alpha)), arXiv 2408.10631, section 3.3.

    With the pruned weights' metric sorted in descending order (g) and the kept weights' in ascending order (p), R is
    the number of i with g_i > p_i. Since g_i - p_i decreases with i, R is the largest r for which some value t has r
    pruned weights above it and r kept weights at or below it: R = max over t of min(#pruned > t, #kept <= t). As t
    grows the first count falls and the second rises; they are equal where the number of all weights at or below t is
    the number of pruned weights. With top_k the pairs are sorted and counted as they are.

    Args:
        metric: per matrix, non-negative float32 [O, I].
        masks: per matrix, bool [O, I], True = kept.
        alpha: fraction of the R pairs to swap, in [0, 1].
        axes: axes that a group spans, besides all given matrices; see `AXES`.
        selection: implementation. top_k takes one matrix where a group spans one axis.

    Returns:
        int32, one number per group; the reduced axes are kept with size 1.
    """
    keys = [to_keys(m) for m in metric]
    if _by_top_k(selection, axes):
        ((key,), (mask,)) = keys, masks
        return _rows(top_k.swaps(_rows(key, axes), _rows(mask, axes), alpha).count, axes)
    total = _count([~mask for mask in masks], axes)
    cross = _threshold(keys, total, axes)

    def count_at_most(bound: jax.Array, kind: Arrays) -> jax.Array:
        return _count([flag & (key <= bound) for flag, key in zip(kind, keys, strict=True)], axes)

    above = total - count_at_most(cross, [~mask for mask in masks])
    # With `cross` = 0, the second count is 0, since no key is negative.
    outliers = jnp.maximum(above, count_at_most(cross - 1, masks))
    return swaps_of_outliers(outliers, alpha)


def swap(metric: Arrays, masks: Arrays, alpha: jax.Array, granularity: str, selection: Selection = "count") -> Arrays:
    """Swap weights in the masks of one sub-block (arXiv 2408.10631, section 3.3).

    In every comparison group, the pruned weights with the highest metric are regrown, and as many kept weights with
    the lowest metric are pruned. The sparsity of every group is exactly unchanged.

    Args:
        metric: per matrix, non-negative float32 [O, I].
        masks: per matrix, bool [O, I], True = kept.
        alpha: fraction of the outlier pairs to swap, in [0, 1].
        granularity: a key of `AXES`.
        selection: implementation.

    Returns:
        The new masks, per matrix, bool [O, I].
    """
    axes = AXES[granularity]
    if granularity == "block":
        return _swap_group(metric, masks, alpha, axes)
    pairs = zip(metric, masks, strict=True)
    if _by_top_k(selection, axes):
        return [_rows(top_k.swap(_rows(m, axes), _rows(mask, axes), alpha), axes) for m, mask in pairs]
    return [_swap_group([m], [mask], alpha, axes)[0] for m, mask in pairs]


# Three jitted programs and not one: the temporary arrays of each are several times as large as the weights, and they
# are only certain to be freed between programs.
@partial(jax.jit, static_argnames="axes")
def _select_regrown(metric: Arrays, masks: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """Flag the k pruned weights with the highest metric in every group."""
    return _lowest(_restrict([INFINITY_KEY - to_keys(m) for m in metric], [~mask for mask in masks]), k, axes)


@partial(jax.jit, static_argnames="axes")
def _apply_swaps(metric: Arrays, masks: Arrays, regrown: Arrays, k: jax.Array, axes: tuple[int, ...]) -> Arrays:
    """New masks: the regrown weights are kept, and the k kept weights with the lowest metric in every group pruned."""
    pruned = _lowest(_restrict([to_keys(m) for m in metric], masks), k, axes)
    return [(mask | r) & ~p for mask, r, p in zip(masks, regrown, pruned, strict=True)]


def _swap_group(metric: Arrays, masks: Arrays, alpha: jax.Array, axes: tuple[int, ...]) -> Arrays:
    k = count_swaps(metric, masks, alpha, axes)
    return _apply_swaps(metric, masks, _select_regrown(metric, masks, k, axes), k, axes)


@partial(jax.jit, static_argnames=("keep", "of", "selection"))
def swap_n_of_m(
    metric: jax.Array, mask: jax.Array, alpha: jax.Array, keep: int, of: int, selection: Selection = "count"
) -> jax.Array:
    """Swap weights in the N:M mask of one matrix, keeping the pattern.

    In each output, k weights are regrown as in `swap`. Each group of M then prunes as many of its previously kept
    weights, lowest metric first, as it regrew. A group cannot regrow more than the N weights it kept (which could
    happen when N < M / 2); only its N highest are then regrown, so that the pattern stays exact.

    Args:
        metric: non-negative float32 [O, I].
        mask: bool [O, I] that keeps N of every M.
        alpha: fraction of the outlier pairs to swap, in [0, 1].
        keep, of: N and M.
        selection: implementation.

    Returns:
        The new mask, bool [O, I].
    """
    if selection == "top_k":
        regrown = top_k.swaps(to_keys(metric), mask, alpha).regrown()
    else:
        k = count_swaps([metric], [mask], alpha, AXES["output1"])
        regrown = _select_regrown([metric], [mask], k, AXES["output1"])[0]
    keys, kept, regrown = (array.reshape(mask.shape[0], -1, of) for array in (to_keys(metric), mask, regrown))
    regrown = _first(INFINITY_KEY - keys, regrown, keep, selection)
    pruned = _first(keys, kept, jnp.sum(regrown, axis=-1, keepdims=True, dtype=jnp.int32), selection)
    return ((kept | regrown) & ~pruned).reshape(mask.shape)
