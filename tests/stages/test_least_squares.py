"""Least squares as a stage, and its solver against NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from stage_contract import StageContract

from barber_jax.stages.least_squares import solve

INPUTS, OUTPUTS, DAMPING = 12, 5, 0.01


class TestLeastSquares(StageContract):
    stage = "least squares"
    options = ("--no-rebuild", "--least-squares", 8)
    swaps = False


@pytest.mark.slow
class TestBeforeTraining(StageContract):
    stage = "least squares"
    options = ("--alpha", 0.2, "--refine", 3, "--least-squares", 5, "--reconstruct", 4, "--rounds", 2)
    mesh_agreement = 0.99


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))
    mask = rng.random((OUTPUTS, INPUTS)) < 0.5
    mask[0], mask[1] = False, True
    return rows, rng.standard_normal((INPUTS, OUTPUTS)), mask


def damped(rows):
    gram = rows.T @ rows
    return gram + DAMPING * np.mean(np.diagonal(gram)) * np.eye(len(gram))


def solved(kernel, dense, mask, rows, missing, steps):
    arguments = (np.float32(each) for each in (kernel, dense))
    missing = None if missing is None else jnp.float32(missing)
    gram = jnp.float32(rows.T @ rows)
    return np.asarray(solve(*arguments, mask, gram, missing, jnp.float32(DAMPING), jnp.int32(steps), (None, None)))


def test_the_dense_output_is_approximated_as_well_as_it_can_be(problem):
    rows, dense, mask = problem
    start = np.where(mask.T, dense + 0.1, 7.0)
    got = solved(start, dense, mask, rows, None, 60)
    gram = damped(rows)
    for output in range(OUTPUTS):
        kept = mask[output]
        np.testing.assert_array_equal(got[~kept, output], np.float32(dense[~kept, output]))
        begin = np.where(kept, start[:, output], 0)
        # The damping holds the change small, not the weights.
        right = rows.T @ rows @ (dense[:, output] - begin)
        change = np.linalg.solve(gram[np.ix_(kept, kept)], right[kept])
        np.testing.assert_allclose(got[kept, output], begin[kept] + change, rtol=1e-3, atol=1e-3)


def test_the_last_linear_gives_what_the_output_lacks(problem):
    rows, dense, mask = problem
    target = np.random.default_rng(1).standard_normal((len(rows), OUTPUTS))
    start = np.where(mask.T, dense, 0)
    got = solved(dense, dense, mask, rows, rows.T @ (target - rows @ start), 60)
    for output in range(OUTPUTS):
        kept = mask[output]
        right = (rows.T @ (target - rows @ start))[kept, output]
        change = np.linalg.solve(damped(rows)[np.ix_(kept, kept)], right)
        np.testing.assert_allclose(got[kept, output], start[kept, output] + change, rtol=1e-3, atol=1e-3)


def test_every_step_lowers_the_error_and_inputs_of_zeros_change_nothing(problem):
    rows, dense, mask = problem
    rows = rows.copy()
    rows[:, 3] = 0
    errors = []
    for steps in range(6):
        got = np.where(mask.T, solved(dense, dense, mask, rows, None, steps), 0)
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got[3], np.where(mask[:, 3], np.float32(dense[3]), 0))
        errors.append(float(np.square(rows @ (got - dense)).sum()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_nothing_but_zeros_stays_as_it_is(problem):
    _, dense, mask = problem
    got = solved(dense, dense, mask, np.zeros((4, INPUTS)), None, 3)
    np.testing.assert_array_equal(got, np.float32(dense))
