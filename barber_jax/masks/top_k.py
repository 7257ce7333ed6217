"""Selects weights with `jax.lax.top_k`, as exactly as `selection` does by counting. Groups lie along the last axis.

Of equal keys top_k gives the lower index first, which is the rule for ties. How many weights a group selects is only
known when the program runs, so the whole group is put in order, and the last selected key and its place are read off.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.masks.keys import INFINITY_KEY, restrict, swaps_of_outliers, to_keys


class Order(NamedTuple):
    """Keys of every group in ascending order, int32 [..., n], and the index of each in its group."""

    keys: jax.Array
    places: jax.Array


def ascending(keys: jax.Array, count: int | None = None) -> Order:
    """Put the non-negative int32 keys [..., n] of every group in order; of equal ones the lower index comes first.

    Args:
        count: how many of the lowest are needed; None for all.
    """
    # ~ reverses the order of integers and, unlike negation, overflows for none.
    complements, places = lax.top_k(~keys, keys.shape[-1] if count is None else count)
    return Order(~complements, places)


def flag_first(keys: jax.Array, order: Order, k: int | jax.Array) -> jax.Array:
    """Flag the first k of every group: bool [..., n] for keys [..., n], their order, and k a number or [..., 1]."""
    k = jnp.broadcast_to(jnp.asarray(k, jnp.int32), (*keys.shape[:-1], 1))
    last = jnp.maximum(k - 1, 0)
    bound, place = (jnp.take_along_axis(array, last, axis=-1) for array in order)
    index = lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    return (k > 0) & ((keys < bound) | ((keys == bound) & (index <= place)))


def lowest(keys: jax.Array, k: int | jax.Array) -> jax.Array:
    """Flag the k lowest keys of every group; ties go to the lower index.

    Args:
        keys: non-negative int32 [..., n].
        k: at most n; a number, or int32 [..., 1].
    """
    known = k if isinstance(k, int) else None
    return jnp.zeros(keys.shape, bool) if known == 0 else flag_first(keys, ascending(keys, known), k)


class Swaps(NamedTuple):
    """The swaps of every group.

    Attributes:
        regrow, prune: keys int32 [..., n]; the pruned weights regrow, and the kept ones are pruned, lowest first.
        regrow_order, prune_order: their orders.
        count: number of swaps, int32 [..., 1].
    """

    regrow: jax.Array
    regrow_order: Order
    prune: jax.Array
    prune_order: Order
    count: jax.Array

    def regrown(self) -> jax.Array:
        """Flag the pruned weights that regrow: bool [..., n]."""
        return flag_first(self.regrow, self.regrow_order, self.count)

    def pruned(self) -> jax.Array:
        """Flag the kept weights that are pruned: bool [..., n]."""
        return flag_first(self.prune, self.prune_order, self.count)


def swaps(keys: jax.Array, mask: jax.Array, alpha: jax.Array) -> Swaps:
    """Find the swaps of every group (arXiv 2408.10631, section 3.3).

    With the keys of the pruned weights in descending order (g) and those of the kept ones in ascending order (p), the
    number of outlier pairs is that of i with g_i > p_i. Both orders are found once, for the number and for the weights.

    Args:
        keys: int32 [..., n]. mask: bool [..., n], True = kept.
        alpha: fraction of the outlier pairs to swap.
    """
    regrow, prune = restrict(INFINITY_KEY - keys, ~mask), restrict(keys, mask)
    regrow_order, prune_order = ascending(regrow), ascending(prune)
    # Excluded entries are the lowest g, below zero, and the highest p: they are in no pair.
    pairs = (INFINITY_KEY - regrow_order.keys) > prune_order.keys
    outliers = jnp.sum(pairs, axis=-1, keepdims=True, dtype=jnp.int32)
    return Swaps(regrow, regrow_order, prune, prune_order, swaps_of_outliers(outliers, alpha))


@jax.jit
def swap(metric: jax.Array, mask: jax.Array, alpha: jax.Array) -> jax.Array:
    """The new mask of one matrix, as `selection.swap`, for groups along the last axis: bool [..., n]."""
    found = swaps(to_keys(metric), mask, alpha)
    return (mask | found.regrown()) & ~found.pruned()
