"""ALPS against a plain NumPy statement of the paper's equations, in float64, and against SparseGPT's error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from criterion_contract import CriterionContract

from barber_jax.console.errors import BarberError
from barber_jax.criteria import alps, sparsegpt
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selector import Selector

INPUTS, OUTPUTS, SAMPLES = 48, 32, 3
FREE, STRUCTURED = SparsityPattern(0.5), SparsityPattern(0.5, 2, 4)
SETTINGS = [(FREE, 0.5), (FREE, 0.7), (STRUCTURED, 0.5)]
NAMES = ["50 %", "70 %", "2:4"]


@partial(jax.jit, static_argnames="pattern")
def jitted(kernel, layer, pattern, quota):
    return alps.start(kernel, layer, SAMPLES, pattern, quota, Selector())


def start(kernel, gram, pattern, sparsity):
    """Mask [O, I] and updated kernel [I, O]. The quota is traced, so all sparsities share one program."""
    quota = () if pattern.structured else (np.int32(alps.CRITERION.quota((OUTPUTS, INPUTS), sparsity)[0]),)
    layer = alps.prepare(jnp.asarray(gram), SAMPLES, "x", print)
    return [np.asarray(each) for each in jitted(jnp.asarray(kernel), layer, pattern, quota)]


def problem(seed, dead=()):
    """Random weights [I, O], and the Gram matrix of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(SAMPLES, 2 * INPUTS, 6)) @ rng.normal(size=(6, INPUTS))
    x = (few + rng.normal(size=(SAMPLES, 2 * INPUTS, INPUTS))) * rng.uniform(0.3, 2, INPUTS)
    x[..., list(dead)] = 0
    gram = np.einsum("sli,slj->ij", x, x).astype(np.float32)
    return rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32), gram


def damped(gram):
    """H in float64, as for SparseGPT."""
    hessian = gram.astype(np.float64) * 2 / SAMPLES
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    return hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))


def error(updated, kernel, hessian):
    change = updated.astype(np.float64) - kernel
    return np.sum(change * (hessian @ change))


def project(matrix, pattern, sparsity):
    """P_k: the largest weights of the matrix [I, O] by magnitude, or of every group of an output's inputs."""
    groups = np.abs(matrix.T).reshape((-1, pattern.of) if pattern.structured else (1, -1))
    keep = pattern.keep if pattern.structured else matrix.size - int(matrix.size * sparsity)
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, np.argsort(-groups, axis=1, kind="stable")[:, :keep], True, axis=1)
    return np.where(kept.reshape(matrix.T.shape).T, matrix, 0)


def least_squares(hessian, kernel, kept):
    """The weights under a mask [I, O] with the lowest error, output by output."""
    best = np.zeros(kernel.shape)
    for output, rows in enumerate(kept.T):
        best[rows, output] = np.linalg.solve(hessian[np.ix_(rows, rows)], (hessian @ kernel[:, output])[rows])
    return best


def plain(kernel, gram, pattern, sparsity):
    """Mask [I, O] and weights: algorithm 1, and what algorithm 2 converges to."""
    hessian = damped(gram)
    scale = 1 / np.sqrt(np.diag(hessian))
    scaled, target = hessian * scale * scale[:, None], kernel / scale[:, None]
    d, v, rho, before = target, np.zeros(kernel.shape), 0.1, np.ones(kernel.shape, bool)
    for _ in range(100):
        for _ in range(3):
            w = np.linalg.solve(scaled + rho * np.eye(len(scaled)), scaled @ target - v + rho * d)
            d = project(w + v / rho, pattern, sparsity)
            v = v + rho * (w - d)
        changed, kept = np.sum((d != 0) != before), np.sum(d != 0)
        if changed == 0:
            break
        rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
        before = d != 0
    return before, least_squares(hessian, kernel, before)


@pytest.mark.parametrize(("pattern", "sparsity"), SETTINGS, ids=NAMES)
def test_masks_and_weights_are_those_of_the_equations(pattern, sparsity):
    kernel, gram = problem(0)
    mask, updated = start(kernel, gram, pattern, sparsity)
    kept, want = plain(kernel, gram, pattern, sparsity)
    assert kept.sum() == mask.sum()
    # Rounding decides near ties.
    assert np.sum(kept != mask.T) <= 2
    assert (updated[~mask.T] == 0).all() and (updated[mask.T] != 0).all()
    hessian = damped(gram)
    assert error(updated, kernel, hessian) == pytest.approx(error(want, kernel, hessian), rel=1e-4)
    same = (kept == mask.T).all(axis=0)
    np.testing.assert_allclose(updated[:, same], want[:, same], atol=4e-3)


@pytest.mark.parametrize(("pattern", "sparsity"), SETTINGS, ids=NAMES)
def test_lower_error_than_sparsegpts(pattern, sparsity):
    settings = {"samples": SAMPLES, "pattern": pattern, "select": Selector()}
    prune_as_sparsegpt = jax.jit(partial(sparsegpt.start, **settings))
    for seed in range(1, 5):
        kernel, gram = problem(seed)
        _, updated = start(kernel, gram, pattern, sparsity)
        quota = () if pattern.structured else sparsegpt.quota((OUTPUTS, INPUTS), sparsity)
        factor = sparsegpt.prepare(jnp.asarray(gram), SAMPLES, "x", print)
        _, theirs = prune_as_sparsegpt(jnp.asarray(kernel), factor, quota=quota)
        for hessian in (damped(gram), gram.astype(np.float64)):
            assert error(updated, kernel, hessian) < error(np.asarray(theirs), kernel, hessian)


def test_conjugate_gradients_end_at_the_least_squares_solution():
    kernel, gram = problem(5)
    layer = alps.decompose(jnp.asarray(gram), SAMPLES)
    mask = np.random.default_rng(0).random((OUTPUTS, INPUTS)) < 0.4
    mask[0] = False
    target = kernel.T / np.asarray(layer.scale)
    solved = alps.solve(target, jnp.where(mask, target, 0.0), mask, layer, SAMPLES, steps=INPUTS)
    want = least_squares(damped(gram), kernel, mask.T)
    np.testing.assert_allclose((solved * layer.scale).T, want, atol=1e-4)


def test_weights_that_have_the_pattern_stay_as_they_are():
    """They are the minimum already."""
    kernel, gram = problem(6)
    kernel = project(kernel, STRUCTURED, 0.5)
    mask, updated = start(kernel, gram, STRUCTURED, 0.5)
    np.testing.assert_array_equal(mask.T, kernel != 0)
    np.testing.assert_array_equal(updated, kernel)


def test_dead_inputs_are_zeroed():
    kernel, gram = problem(7, dead=(3, 20))
    mask, updated = start(kernel, gram, FREE, 0.5)
    assert not mask[:, [3, 20]].any() and (updated[[3, 20]] == 0).all()


def test_sparsity_zero_changes_nothing():
    kernel, gram = problem(8)
    mask, updated = start(kernel, gram, FREE, 0.0)
    assert mask.all()
    np.testing.assert_array_equal(updated, kernel)


def test_a_hessian_without_eigenvalues_is_an_error():
    with pytest.raises(BarberError, match=r"mlp\.in.*samples"):
        alps.prepare(jnp.asarray([[jnp.nan, 0.0], [0.0, 1.0]], jnp.float32), 1, "mlp.in", print)


class TestALPS(CriterionContract):
    method = "alps"
    options = ("--method", "alps", "--no-rebuild")
    group = (0, 1)
    # Step after step it turns rounding into other weights.
    mesh_agreement = 0.98
