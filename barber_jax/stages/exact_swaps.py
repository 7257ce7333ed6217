"""Swaps in one matrix that lower its layer-wise error, each by an exactly known amount (idea: arXiv 2512.10922).

For one matrix with dense weights D, surviving weights W, mask m, and the Gram matrix G = sum X^T X of its input, the
error of an output is e^T G e with e = D - m * W. Pruning a kept input u adds W_u to e_u, regrowing a pruned input p
takes W_p from e_p. With r_i = W_i where kept and -W_i where pruned, and c = G e, both together change the error by

    own_u + own_p + 2 r_u r_p G_up,    own_i = r_i (2 c_i + r_i G_ii)

A step makes, in every output, the best such swap of a shortlist, if it lowers the error by more than rounding could; c
is then updated by r_u G_u + r_p G_p. The error never rises and every output keeps as many weights as before.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

SHORTLIST = 16
"""Candidates to prune and to regrow, for each output and step."""
GUARD = 4.0
"""A swap must gain more than this many float32 epsilons of the terms it is the difference of."""


@partial(jax.jit, static_argnames=("of", "shortlist"))
def make_swaps(
    kernel: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    limit: jax.Array,
    *,
    of: int = 0,
    shortlist: int = SHORTLIST,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Make at most `limit` swaps in each output of a matrix, each the one that lowers its error most.

    Unstructured, the inputs are dealt into `shortlist` interleaved slices, and the shortlist holds of each slice the
    input that is best to prune and the one that is best to regrow, taken alone. N:M swaps stay within a group of M, and
    all of them are considered.

    Args:
        kernel: [I, O], weights as they survive; where pruned, the value that a weight regrows as.
        dense: [I, O], weights whose output the pruned ones should give.
        mask: bool [O, I], True = kept.
        gram: float32 [I, I], positive semi-definite.
        limit: int32, swaps in each output at most.
        of: M of an N:M pattern, 0: unstructured. A group keeps as many as it keeps in `mask`.

    Returns:
        bool [O, I] mask, and the error before and after, summed over outputs.
    """
    weights, target = kernel.astype(jnp.float32).T, dense.astype(jnp.float32).T
    if of:
        weights, target, mask = (_by_place(array, 1, of) for array in (weights, target, mask))
        gram = _by_place(_by_place(gram, 0, of), 1, of)
    diagonal = jnp.diagonal(gram)
    size = jnp.abs(weights) * jnp.sqrt(diagonal)
    most = jnp.sum(jnp.maximum(jnp.abs(target), jnp.abs(target - weights)) * jnp.sqrt(diagonal), axis=1, keepdims=True)
    inputs = jnp.arange(mask.shape[1])

    def improve(state):
        step, mask, slope, _ = state
        change = jnp.where(mask, weights, -weights)
        own = change * (2 * slope + change * diagonal)
        if of:
            lost = found = _best_group(own, change, mask, gram, of)
        else:
            lost, found = (_best_of_slices(jnp.where(side, own, jnp.inf), shortlist) for side in (mask, ~mask))
        gain, lost, found = _best_pair(own, change, mask, gram, lost, found)
        both = _at(size, lost) + _at(size, found)
        better = gain < -GUARD * jnp.finfo(jnp.float32).eps * both * (both + 2 * most)
        flips = better & ((inputs == lost) | (inputs == found))
        slope += jnp.where(better, _at(change, lost) * gram[lost[:, 0]] + _at(change, found) * gram[found[:, 0]], 0.0)
        return step + 1, mask ^ flips, slope, jnp.any(better)

    slope, before = errors(weights, target, mask, gram)
    state = (jnp.int32(0), mask, slope, jnp.bool(True))
    new = lax.while_loop(lambda state: state[3] & (state[0] < limit), improve, state)[1]
    _, after = errors(weights, target, new, gram)
    # The guard is what rounding is expected to be, not a bound: what was measured to be worse is not taken.
    worse = after > before
    new = jnp.where(worse[:, None], mask, new)
    if of:
        new = _by_place(new, 1, mask.shape[1] // of)
    return new, jnp.sum(before), jnp.sum(jnp.where(worse, before, after))


def errors(weights: jax.Array, target: jax.Array, mask: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer-wise error of each output, and its gradient.

    Args:
        weights, target: float32 [O, I], the surviving weights, and the dense ones.
        mask: bool [O, I]. gram: float32 [I, I].

    Returns:
        c = G e [O, I] and e^T G e [O].
    """
    error = target - jnp.where(mask, weights, 0.0)
    slope = jnp.matmul(error, gram, precision=lax.Precision.HIGHEST)
    return slope, jnp.sum(error * slope, axis=1)


def _by_place(array: jax.Array, axis: int, of: int) -> jax.Array:
    """Reorder the inputs: the first of every M, then the second of every M, and so on. Undone with I / M for M."""
    shape = array.shape
    grouped = array.reshape(*shape[:axis], -1, of, *shape[axis + 1 :])
    return jnp.swapaxes(grouped, axis, axis + 1).reshape(shape)


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[o, index[o, k]]."""
    return jnp.take_along_axis(array, index, axis=1)


def _best_of_slices(values: jax.Array, slices: int) -> jax.Array:
    """Where, in each of the interleaved slices of an output's inputs, the lowest value is: [O, I] -> int32 [O, slices].

    An argmin is slow on a CPU and a minimum is not. So the position takes the place of the last bits of the value,
    which then decide no more; the values' order is that of their bits as integers, where the negative are mirrored.
    """
    outputs, inputs = values.shape
    slices = min(slices, inputs)
    padded = jnp.pad(values, ((0, 0), (0, -inputs % slices)), constant_values=jnp.inf).reshape(outputs, -1, slices)
    width = (padded.shape[1] - 1).bit_length()
    bits = lax.bitcast_convert_type(padded, jnp.int32)
    keys = bits ^ ((bits >> 31) & jnp.iinfo(jnp.int32).max)
    position = jnp.arange(padded.shape[1], dtype=jnp.int32)[:, None]
    lowest = jnp.min((keys >> width << width) | position, axis=1)
    return (lowest & ((1 << width) - 1)) * slices + jnp.arange(slices)


def _best_group(own: jax.Array, change: jax.Array, mask: jax.Array, gram: jax.Array, of: int) -> jax.Array:
    """The inputs of the group in which an output's best swap is: int32 [O, M]. Inputs lie by place, see `_by_place`."""
    outputs, inputs = own.shape
    groups = inputs // of
    own, change, mask = (array.reshape(outputs, of, groups) for array in (own, change, mask))
    within = jnp.diagonal(gram.reshape(of, groups, of, groups), axis1=1, axis2=3)
    best = jnp.full((outputs, groups), jnp.inf)
    for apart in range(1, of):
        low, high = slice(of - apart), slice(apart, of)
        shared = jnp.stack([within[place, place + apart] for place in range(of - apart)])
        gain = own[:, low] + own[:, high] + 2 * change[:, low] * change[:, high] * shared
        best = jnp.minimum(best, jnp.min(jnp.where(mask[:, low] != mask[:, high], gain, jnp.inf), axis=1))
    return jnp.argmin(best, axis=1, keepdims=True) + groups * jnp.arange(of)


def _best_pair(
    own: jax.Array, change: jax.Array, mask: jax.Array, gram: jax.Array, lost: jax.Array, found: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best swap among candidates.

    Args:
        own, change, mask, gram: as in `refine`.
        lost, found: int32 [O, A], [O, B], candidates to prune and to regrow. The kept of `lost` and the pruned of
            `found` take part.

    Returns:
        Its change of the error, infinite if there is none, and the two inputs, each [O, 1].
    """
    down = jnp.where(_at(mask, lost), _at(own, lost), jnp.inf)
    up = jnp.where(_at(mask, found), jnp.inf, _at(own, found))
    shared = _at(change, lost)[:, :, None] * _at(change, found)[:, None, :] * gram[lost[:, :, None], found[:, None, :]]
    gains = down[:, :, None] + up[:, None, :] + 2 * shared
    # One axis after the other: an argmin over both is several times as slow on a CPU.
    best = jnp.argmin(jnp.min(gains, axis=1), axis=1, keepdims=True)
    column = jnp.take_along_axis(gains, best[:, None], axis=2)[:, :, 0]
    row = jnp.argmin(column, axis=1, keepdims=True)
    return _at(column, row), _at(lost, row), _at(found, best)
