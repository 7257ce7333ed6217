"""Refinement against NumPy in float64. Problems of small integers are exact in float32 too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from barber_jax.devices import Devices
from barber_jax.models.sharding import MODEL
from barber_jax.stages import exact_swaps as module
from barber_jax.stages.exact_swaps import make_swaps

# Few shapes (outputs, inputs, of), so that each compiles once; one output and inputs that no shortlist divides.
SHAPES = st.sampled_from([(4, 12, 0), (1, 7, 0), (3, 12, 4), (2, 12, 3), (1, 8, 8)])
PATTERNS = [(0, 0), (2, 4), (1, 4), (6, 8)]
MANY = 1000
EXACT = 64
"""A shortlist that holds every input of the small problems."""


def integers(shape, bound):
    return hnp.arrays(np.float32, shape, elements=st.integers(-bound, bound).map(float))


def losses(kernel, dense, mask, gram):
    """float64 [O], from the definition."""
    error = dense.T.astype(np.float64) - np.where(mask, kernel.T, 0).astype(np.float64)
    return np.einsum("oi,ij,oj->o", error, gram.astype(np.float64), error)


def swapped(mask, output, down, up):
    new = mask.copy()
    new[output, down], new[output, up] = False, True
    return new


def best_swap(kernel, dense, mask, gram, output, of=0):
    """The lowest loss of an output that one swap gives, and its row of the mask; infinite where there is no swap."""
    of = of or mask.shape[1]
    best, row = np.inf, mask[output]
    for down, up in itertools.product(np.flatnonzero(mask[output]), np.flatnonzero(~mask[output])):
        if down // of == up // of:
            new = swapped(mask, output, down, up)
            loss = losses(kernel[:, [output]], dense[:, [output]], new[[output]], gram)[0]
            if loss < best:
                best, row = loss, new[output]
    return best, row


def run(kernel, dense, mask, gram, swaps=MANY, **options):
    arrays = (jnp.asarray(array) for array in (kernel, dense, mask, gram))
    new, before, after = make_swaps(*arrays, jnp.int32(swaps), **options)
    return np.asarray(new), float(before), float(after)


def counts(mask, of=0):
    return mask.reshape(mask.shape[0], -1, of or mask.shape[1]).sum(-1)


def correlated(outputs, inputs, keep=0, of=0, seed=0):
    """Weights, Gram matrix and the mask Wanda gives, of inputs with common factors; some are dead."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * inputs, inputs // 4)) @ rng.normal(size=(inputs // 4, inputs)) + 0.3
    x = (x * np.exp(rng.normal(size=inputs))).astype(np.float32)
    x[:, ::11] = 0
    gram = x.T @ x
    dense = rng.normal(size=(inputs, outputs)).astype(np.float32)
    score = (np.abs(dense.T) * np.sqrt(np.diag(gram))).reshape(outputs, -1, of or inputs)
    rank = np.argsort(np.argsort(score, axis=-1, kind="stable"), axis=-1)
    mask = (rank >= score.shape[-1] - (keep or inputs // 2)).reshape(outputs, inputs)
    return dense, mask, gram


def fitted(dense, mask, gram):
    """Weights [I, O] of which the survivors are moved half of the way to where they best make up for the pruned."""
    kernel = dense.astype(np.float64)
    for output, kept in enumerate(mask):
        pull = gram.astype(np.float64)[np.ix_(kept, ~kept)] @ kernel[~kept, output]
        kernel[kept, output] += 0.5 * np.linalg.lstsq(gram[np.ix_(kept, kept)], pull, rcond=1e-4)[0]
    return kernel.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(st.data(), SHAPES, st.booleans(), st.sampled_from([0, 1, 2, MANY]), st.sampled_from([1, 3, EXACT]))
def test_any_problem(data, shape, moved, swaps, shortlist):
    """Any mask: nothing or all pruned too; weights and inputs with zeros and ties."""
    outputs, inputs, of = shape
    dense = data.draw(integers((inputs, outputs), 3))
    kernel = data.draw(integers((inputs, outputs), 3)) if moved else dense
    x = data.draw(integers((5, inputs), 2))
    gram = x.T @ x
    mask = data.draw(hnp.arrays(bool, (outputs, inputs)))
    new, before, after = run(kernel, dense, mask, gram, swaps, of=of, shortlist=shortlist)
    old_losses, new_losses = losses(kernel, dense, mask, gram), losses(kernel, dense, new, gram)
    assert before == old_losses.sum() and after == new_losses.sum()
    assert (new_losses <= old_losses).all()
    changed = (new != mask).any(axis=1)
    assert (new_losses[changed] < old_losses[changed]).all()
    np.testing.assert_array_equal(counts(new, of), counts(mask, of))
    assert ((new & ~mask).sum(axis=1) <= swaps).all()
    if swaps == MANY and (of or shortlist == EXACT):
        for output in range(outputs):
            assert best_swap(kernel, dense, new, gram, output, of)[0] >= new_losses[output]


@settings(max_examples=100, deadline=None)
@given(st.data(), SHAPES)
def test_one_swap_is_the_best_of_all(data, shape):
    outputs, inputs, of = shape
    dense, kernel = (data.draw(integers((inputs, outputs), 3)) for _ in range(2))
    x = data.draw(integers((5, inputs), 2))
    mask = data.draw(hnp.arrays(bool, (outputs, inputs)))
    new, _, _ = run(kernel, dense, mask, x.T @ x, 1, of=of, shortlist=EXACT)
    old_losses, new_losses = losses(kernel, dense, mask, x.T @ x), losses(kernel, dense, new, x.T @ x)
    for output in range(outputs):
        best, _ = best_swap(kernel, dense, mask, x.T @ x, output, of)
        assert new_losses[output] == min(best, old_losses[output])


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_every_step_lowers_the_loss(keep, of, moved):
    dense, mask, gram = correlated(20, 144, keep, of)
    kernel = fitted(dense, mask, gram) if moved else dense
    last, last_losses = mask, losses(kernel, dense, mask, gram)
    for swaps in range(1, MANY):
        new, before, after = run(kernel, dense, mask, gram, swaps, of=of)
        new_losses = losses(kernel, dense, new, gram)
        changed = (new != last).any(axis=1)
        assert (new_losses[changed] < last_losses[changed]).all()
        assert ((new & ~last).sum(axis=1) == changed).all()
        np.testing.assert_array_equal(counts(new, of), counts(mask, of))
        np.testing.assert_allclose(before, losses(kernel, dense, mask, gram).sum(), rtol=1e-4)
        np.testing.assert_allclose(after, new_losses.sum(), rtol=1e-4)
        if not changed.any():
            break
        last, last_losses = new, new_losses
    assert after < 0.9 * before


@pytest.mark.parametrize(("keep", "of"), PATTERNS[1:])
def test_n_of_m_ends_where_no_swap_helps(keep, of):
    dense, mask, gram = correlated(3, 48, keep, of, seed=1)
    new, before, _ = run(dense, dense, mask, gram, of=of)
    for output, loss in enumerate(losses(dense, dense, new, gram)):
        assert best_swap(dense, dense, new, gram, output, of)[0] > loss - 1e-5 * before


def test_shortlist_holds_the_best_to_prune_and_the_best_to_revive():
    outputs, inputs = 8, 100
    rng = np.random.default_rng(2)
    x = rng.integers(-2, 3, (200, inputs)).astype(np.float32)
    dense, kernel = rng.integers(-4, 5, (2, inputs, outputs)).astype(np.float32)
    mask, gram = rng.random((outputs, inputs)) < 0.5, x.T @ x
    new_losses = losses(kernel, dense, run(kernel, dense, mask, gram, 1)[0], gram)
    for output in range(outputs):
        flipped = [mask[[output]] ^ (np.arange(inputs) == i) for i in range(inputs)]
        single = np.concatenate([losses(kernel[:, [output]], dense[:, [output]], m, gram) for m in flipped])
        down = np.argmin(np.where(mask[output], single, np.inf))
        up = np.argmin(np.where(mask[output], np.inf, single))
        assert new_losses[output] <= losses(kernel, dense, swapped(mask, output, down, up), gram)[output]


def test_reaches_the_best_mask_where_steepest_descent_does():
    """Six inputs, half of them kept, from each of the 20 masks there are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 6)) + 0.5 * rng.normal(size=(40, 6))
    gram = (x.T @ x).astype(np.float32)
    masks = np.array([np.isin(np.arange(6), kept) for kept in itertools.combinations(range(6), 3)])
    weights = np.repeat(rng.normal(size=(6, 1)), len(masks), axis=1).astype(np.float32)
    descended = masks.copy()
    for output in range(len(masks)):
        loss, row = best_swap(weights, weights, descended, gram, output)
        while loss < losses(weights, weights, descended, gram)[output]:
            descended[output] = row
            loss, row = best_swap(weights, weights, descended, gram, output)
    new, _, _ = run(weights, weights, masks, gram)
    np.testing.assert_array_equal(new, descended)
    best = losses(weights, weights, masks, gram).min()
    assert (losses(weights, weights, new, gram) == best).sum() > len(masks) / 2


def test_independent_inputs_give_the_best_mask_from_any():
    gram = np.diag(np.arange(1, 7)).astype(np.float32)
    masks = np.array([np.isin(np.arange(6), kept) for kept in itertools.combinations(range(6), 2)])
    weights = np.repeat(np.float32([[3], [-2], [1], [2], [-1], [1]]), len(masks), axis=1)
    # w^2 G: 9, 8, 3, 16, 5, 6.
    np.testing.assert_array_equal(
        run(weights, weights, masks, gram)[0], [[True, False, False, True, False, False]] * 15
    )


def test_literal_swap():
    # The first two inputs are one, and their weights cancel: best pruned together, which no score of one weight sees.
    gram = np.eye(4, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 1
    weights = np.float32([[3], [-3], [1], [2]])
    new, before, after = run(weights, weights, np.array([[False, True, False, True]]), gram)
    np.testing.assert_array_equal(new, [[False, False, True, True]])
    assert (before, after) == (10, 0)


def test_equal_inputs_do_not_swap_for_ever():
    """Swaps between inputs that are equal but for rounding change nothing: they are not made."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(512, 64)).astype(np.float32)
    x = np.concatenate([x, x * (1 + 1e-7 * rng.normal(size=x.shape))], axis=1).astype(np.float32)
    weights = np.tile(rng.normal(size=(64, 16)), (2, 1)).astype(np.float32)
    mask, gram = rng.random((16, 128)) < 0.5, x.T @ x
    ends = [run(weights, weights, mask, gram, swaps)[0] for swaps in (MANY, MANY + 1)]
    np.testing.assert_array_equal(*ends)


def test_what_is_measured_to_be_worse_is_not_taken(monkeypatch):
    """Were the guard far too low, swaps that raise the error would be made."""
    monkeypatch.setattr(module, "GUARD", -1e9)
    dense, mask, gram = correlated(8, 48)
    old_losses = losses(dense, dense, mask, gram)
    for swaps in (1, 30):
        # Not jitted: the program must not be kept.
        new, before, after = module.make_swaps.__wrapped__(*map(jnp.asarray, (dense, dense, mask, gram)), swaps)
        new_losses = losses(dense, dense, np.asarray(new), gram)
        assert (new_losses <= old_losses).all()
        np.testing.assert_allclose([before, after], [old_losses.sum(), new_losses.sum()], rtol=1e-4)


def test_many_devices_give_the_mask_of_one():
    # Integers, so that sums do not depend on how they are split.
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (96, 48)).astype(np.float32)
    dense, kernel = rng.integers(-3, 4, (2, 48, 16)).astype(np.float32)
    mask, gram = np.tile([True, False], (16, 24)), x.T @ x
    devices = Devices.of((2, 4))
    for of in (0, 4):
        swaps, options = jnp.int32(100), dict(of=of)
        want = jax.device_get(make_swaps(*map(jnp.asarray, (kernel, dense, mask, gram)), swaps, **options))
        for axes in ((None, MODEL), (MODEL, None)):
            with devices.context():
                put = [devices.put(kernel, *axes), devices.put(dense, *axes), devices.put(mask, *axes[::-1])]
                got = devices.fetch(make_swaps(*put, devices.put(gram), swaps, **options))
            np.testing.assert_array_equal(got[0], want[0])
            assert got[1:] == want[1:] and want[2] < want[1]
