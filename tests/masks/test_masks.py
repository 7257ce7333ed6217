"""Selection against NumPy sorts that say the rules in another way."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from barber_jax.masks import selection as masks
from barber_jax.masks.selector import Selector

# Few distinct values, so that ties are everywhere; zeros and infinities of float32's range too.
VALUES = st.sampled_from([0.0, 1e-45, 1e-30, 0.5, 1.0, 1.0000001, 3.0, 3.4e38, np.inf])
# Few shapes, so that each compiles once; one output, one group and more outputs than inputs are among them.
SHAPES = st.sampled_from([(3, 8), (9, 4), (1, 12)])
HOW = ("count", "top_k")
SHAPE_LISTS = st.sampled_from([[(3, 8)], [(9, 4), (1, 12)], [(1, 12), (3, 8), (9, 4)]])

keep_highest = jax.jit(masks.keep_highest, static_argnums=(2, 3))
keep_n_of_m = jax.jit(masks.keep_n_of_m, static_argnums=(1, 2, 3))
swap = jax.jit(masks.swap, static_argnums=(3, 4))
swap_n_of_m = jax.jit(masks.swap_n_of_m, static_argnums=(3, 4, 5))


def matrices(shape):
    return hnp.arrays(np.float32, shape, elements=VALUES)


def groups_of(granularity, shapes):
    """Lists of (matrix, output, input), one list a comparison group, in flat order."""
    every = [[(m, o, i) for o in range(s[0]) for i in range(s[1])] for m, s in enumerate(shapes)]
    if granularity == "block":
        return [functools.reduce(operator.iadd, every, [])]
    if granularity == "layer":
        return every
    axis = 1 if granularity == "output1" else 2
    return [[x for x in matrix if x[axis] == j] for matrix in every for j in sorted({x[axis] for x in matrix})]


def expected_swap(metric, kept, alpha, granularity):
    new = [m.copy() for m in kept]
    for group in groups_of(granularity, [m.shape for m in metric]):
        at = lambda x: metric[x[0]][x[1], x[2]]  # noqa: E731
        up = sorted((x for x in group if not kept[x[0]][x[1], x[2]]), key=lambda x: -at(x))
        down = sorted((x for x in group if kept[x[0]][x[1], x[2]]), key=at)
        outliers = sum(at(g) > at(p) for g, p in zip(up, down, strict=False))
        k = int(np.floor(np.float32(outliers) * np.float32(alpha)))
        for x in up[:k]:
            new[x[0]][x[1], x[2]] = True
        for x in down[:k]:
            new[x[0]][x[1], x[2]] = False
    return new


@settings(max_examples=60, deadline=None)
@given(st.data(), SHAPES, st.sampled_from([(0,), (1,), (0, 1)]))
def test_keep_highest_prunes_exactly_the_stable_lowest(data, shape, axes):
    scores = data.draw(matrices(shape))
    size = np.prod([shape[axis] for axis in axes])
    prune = data.draw(st.integers(0, int(size)))
    got, by_top_k = (np.asarray(keep_highest(jnp.asarray(scores), prune, axes, how)) for how in HOW)
    np.testing.assert_array_equal(by_top_k, got)
    by_group = {(0,): lambda a: a.T, (1,): lambda a: a, (0, 1): lambda a: a.reshape(1, -1)}[axes]
    want = np.ones_like(by_group(scores), bool)
    np.put_along_axis(want, np.argsort(by_group(scores), axis=1, kind="stable")[:, :prune], False, axis=1)
    np.testing.assert_array_equal(by_group(got), want)


@settings(max_examples=60, deadline=None)
@given(st.data(), SHAPES, st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2), (1, 1)]))
def test_keep_n_of_m(data, shape, pattern):
    keep, of = pattern
    scores = data.draw(matrices(shape))
    got, by_top_k = (np.asarray(keep_n_of_m(jnp.asarray(scores), keep, of, how)) for how in HOW)
    np.testing.assert_array_equal(by_top_k, got)
    got = got.reshape(shape[0], -1, of)
    grouped = scores.reshape(shape[0], -1, of)
    want = np.ones_like(grouped, bool)
    np.put_along_axis(want, np.argsort(grouped, axis=-1, kind="stable")[..., : of - keep], False, axis=-1)
    np.testing.assert_array_equal(got, want)


@settings(max_examples=100, deadline=None)
@given(st.data(), SHAPE_LISTS, st.sampled_from(list(masks.AXES)), st.floats(0, 1, width=32))
def test_swap_follows_the_definition(data, shapes, granularity, alpha):
    metric = [data.draw(matrices(shape)) for shape in shapes]
    kept = [data.draw(hnp.arrays(bool, shape)) for shape in shapes]
    want = expected_swap(metric, kept, alpha, granularity)
    for how in HOW:
        got = swap([jnp.asarray(m) for m in metric], [jnp.asarray(m) for m in kept], alpha, granularity, how)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(g), w)


@settings(max_examples=60, deadline=None)
@given(st.data(), SHAPES, st.sampled_from([(1, 4), (2, 4), (3, 4)]), st.floats(0, 1, width=32))
def test_swap_n_of_m_keeps_the_pattern_and_follows_the_definition(data, shape, pattern, alpha):
    keep, of = pattern
    metric = data.draw(matrices(shape))
    start = np.asarray(keep_n_of_m(jnp.asarray(data.draw(matrices(shape))), keep, of))
    got, by_top_k = (
        np.asarray(swap_n_of_m(jnp.asarray(metric), jnp.asarray(start), alpha, keep, of, how)) for how in HOW
    )
    np.testing.assert_array_equal(by_top_k, got)
    assert (got.reshape(shape[0], -1, of).sum(-1) == keep).all()
    for o in range(shape[0]):
        pruned, alive = np.flatnonzero(~start[o]), np.flatnonzero(start[o])
        up = pruned[np.argsort(-metric[o, pruned], kind="stable")]
        down = alive[np.argsort(metric[o, alive], kind="stable")]
        n = min(len(up), len(down))
        outliers = int((metric[o, up[:n]] > metric[o, down[:n]]).sum())
        up = up[: int(np.floor(np.float32(outliers) * np.float32(alpha)))]
        want = start[o].copy()
        for group in np.unique(up // of):
            best = up[up // of == group][:keep]
            own = [i for i in down if i // of == group][: len(best)]
            want[best], want[own] = True, False
        np.testing.assert_array_equal(got[o], want)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([(1, 8), (4, 8), (6, 8)]), st.floats(0, 1, width=32))
def test_top_k_in_groups_of_eight(data, pattern, alpha):
    keep, of = pattern
    metric, scores = (jnp.asarray(data.draw(matrices((2, 16)))) for _ in range(2))
    start, by_top_k = (keep_n_of_m(scores, keep, of, how) for how in HOW)
    np.testing.assert_array_equal(by_top_k, start)
    swapped, by_top_k = (swap_n_of_m(metric, start, alpha, keep, of, how) for how in HOW)
    np.testing.assert_array_equal(by_top_k, swapped)


@pytest.mark.parametrize("granularity", ["output1", "input1"])
def test_number_of_swaps_by_top_k(granularity):
    """Many values that differ, of which none is pruned or kept in some groups."""
    generator = np.random.default_rng(0)
    metric, kept = generator.random((40, 48), np.float32), generator.random((40, 48)) < 0.6
    kept[0], kept[1], kept[:, 0], kept[:, 1] = True, False, True, False
    arguments = ([jnp.asarray(metric)], [jnp.asarray(kept)], jnp.float32(0.3), masks.AXES[granularity])
    counted, by_top_k = (np.asarray(masks.count_swaps(*arguments, how)) for how in HOW)
    assert len(np.unique(counted)) > 3 and counted.min() == 0
    np.testing.assert_array_equal(by_top_k, counted)


@pytest.mark.parametrize("sharded", [(), (0,), (1,)])
def test_the_selector_sorts_only_groups_on_one_device(sharded):
    scores, mask, alpha = jnp.ones((4, 8)), jnp.ones((4, 8), bool), jnp.float32(1)
    outputs_whole, inputs_whole = 1 not in sharded, 0 not in sharded

    def sorts(call, select):
        return "top_k" in str(jax.make_jaxpr(lambda s: call(select, s))(scores))

    calls = [
        (lambda select, s: select.keep_highest(s, 2, (1,)), outputs_whole),
        (lambda select, s: select.keep_highest(s, 2, (0,)), inputs_whole),
        (lambda select, s: select.keep_highest(s, 2, (0, 1)), False),
        (lambda select, s: select.keep_n_of_m(s, 2, 4), outputs_whole),
        (lambda select, s: select.swap(s, mask, alpha, "output1"), outputs_whole),
        (lambda select, s: select.swap(s, mask, alpha, "input1"), inputs_whole),
        (lambda select, s: select.swap(s, mask, alpha, "layer"), False),
        (lambda select, s: select.swap_n_of_m(s, mask, alpha, 2, 4), outputs_whole),
    ]
    assert [sorts(call, Selector("top_k", sharded)) for call, _ in calls] == [expected for _, expected in calls]
    assert not any(sorts(call, Selector("count", sharded)) for call, _ in calls)


def test_top_k_beside_a_sharded_axis():
    """Groups lie on one device, and different ones on different devices: nothing of the result changes."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    generator = np.random.default_rng(1)
    metric, kept = generator.random((8, 16), np.float32), generator.random((8, 16)) < 0.5
    for granularity, spec in (("output1", P("model", None)), ("input1", P(None, "model"))):
        given = [jax.device_put(array, NamedSharding(mesh, spec)) for array in (metric, kept)]
        with jax.set_mesh(mesh):
            got = swap(given[:1], given[1:], 1.0, granularity, "top_k")[0]
        want = expected_swap([metric], [kept], 1.0, granularity)[0]
        np.testing.assert_array_equal(np.asarray(got), want)


def test_literal_swap():
    metric = jnp.asarray([[5.0, 1.0, 4.0, 2.0]])
    kept = jnp.asarray([[False, True, False, True]])
    # g = 5, 4; p = 1, 2: both pairs are outliers, alpha 0.5 swaps the first.
    np.testing.assert_array_equal(swap([metric], [kept], 0.5, "output1")[0], [[True, False, False, True]])


@pytest.mark.parametrize("granularity", list(masks.AXES))
def test_ties_revive_and_prune_the_lower_index(granularity):
    metric = [jnp.full((2, 2), 1.0).at[:, 0].set(2.0)]
    kept = [jnp.asarray([[False, True], [False, True]])]
    got = swap(metric, kept, 0.5, granularity)[0]
    want = {
        "output1": [[False, True], [False, True]],  # one outlier pair in each output: floor(0.5) = 0
        "input1": [[False, True], [False, True]],  # an input holds pruned or kept only
        "layer": [[True, False], [False, True]],
        "block": [[True, False], [False, True]],
    }[granularity]
    np.testing.assert_array_equal(got, want)
