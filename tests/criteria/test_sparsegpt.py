"""SparseGPT against a plain NumPy statement of algorithm 1, in float64 and column by column."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_model
from cli import prune_masks
from criterion_contract import CriterionContract
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.criteria import sparsegpt
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selector import Selector


def plain(kernel, gram, samples, pattern, block=128):
    """Pruned flags and updated kernel, both [inputs, O], by the textbook route through H^-1."""
    weight, inputs = kernel.T.astype(np.float64).copy(), kernel.shape[0]
    hessian = gram.astype(np.float64) * 2 / samples
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    pruned = np.zeros(weight.shape, bool)
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        if not pattern.structured:
            score = weight[:, first:last] ** 2 / np.diag(upper)[first:last] ** 2
            pruned[:, first:last] = score <= np.sort(score, axis=None)[int(score.size * pattern.sparsity)]
        for i in range(first, last):
            if pattern.structured and i % pattern.of == 0:
                score = weight[:, i : i + pattern.of] ** 2 / np.diag(upper)[i : i + pattern.of] ** 2
                lowest = np.argsort(score, axis=1, kind="stable")[:, : pattern.of - pattern.keep]
                np.put_along_axis(pruned[:, i : i + pattern.of], lowest, True, axis=1)
            error = np.where(pruned[:, i], weight[:, i], 0) / upper[i, i]
            weight[:, i:] -= error[:, None] * upper[i, i:][None]
            weight[pruned[:, i], i] = 0
    return pruned.T, weight.T


def problem(inputs, outputs, dead=()):
    rng = np.random.default_rng(inputs)
    x = rng.normal(size=(3, 2 * inputs, inputs)).astype(np.float32) * rng.uniform(0.1, 2, inputs).astype(np.float32)
    x += 0.5 * x[..., :1]
    x[..., list(dead)] = 0
    gram = np.einsum("sli,slj->ij", x, x)
    np.testing.assert_allclose(sparsegpt.statistic(jnp.asarray(x)), gram, rtol=1e-3, atol=1e-2)
    return rng.normal(size=(inputs, outputs)).astype(np.float32), gram


def start(kernel, prepared, pattern):
    quota = () if pattern.structured else sparsegpt.quota(kernel.shape[::-1], pattern.sparsity)
    return sparsegpt.start(jnp.asarray(kernel), prepared, 3, pattern, quota, Selector())


@pytest.mark.parametrize("inputs", [64, 128, 256, 300])
@pytest.mark.parametrize(
    "pattern",
    [
        SparsityPattern(0.5),
        SparsityPattern(0.7),
        SparsityPattern(0.5, 2, 4),
        SparsityPattern(0.75, 1, 4),
        SparsityPattern(1 / 3, 2, 3),
    ],
    ids=str,
)
def test_masks_and_weights(inputs, pattern):
    inputs -= inputs % pattern.of if pattern.structured else 0
    kernel, gram = problem(inputs, 40)
    prepared = sparsegpt.prepare(jnp.asarray(gram), 3, "x", print)
    mask, updated = start(kernel, prepared, pattern)
    pruned, want = plain(kernel, gram, 3, pattern)
    mask, updated = np.asarray(mask), np.asarray(updated)
    assert np.mean(pruned == ~mask.T) >= 0.999
    assert (updated[~mask.T] == 0).all()
    if (pruned == ~mask.T).all():
        np.testing.assert_allclose(updated, want, atol=2e-3)
    if pattern.structured:
        assert (mask.reshape(40, -1, pattern.of).sum(-1) == pattern.keep).all()


def test_dead_inputs_are_zeroed():
    kernel, gram = problem(128, 8, dead=(3, 77))
    prepared = sparsegpt.prepare(jnp.asarray(gram), 3, "x", print)
    mask, updated = start(kernel, prepared, SparsityPattern(0.5))
    assert not np.asarray(mask)[:, [3, 77]].any()
    assert (np.asarray(updated)[[3, 77]] == 0).all()


def test_sparsity_zero_changes_nothing():
    kernel, gram = problem(64, 8)
    prepared = sparsegpt.prepare(jnp.asarray(gram), 3, "x", print)
    mask, updated = start(kernel, prepared, SparsityPattern(0.0))
    assert np.asarray(mask).all()
    np.testing.assert_array_equal(np.asarray(updated), kernel)


def test_damping_is_raised_and_said():
    said = []
    # Two eigenvalues: 1 + a and 1 - a; a > 1 is not positive definite until the damping exceeds a - 1.
    gram = jnp.asarray([[0.5, 0.52], [0.52, 0.5]], jnp.float32)
    sparsegpt.prepare(gram, 1, "self_attn.in", said.append)
    assert len(said) == 1 and "self_attn.in" in said[0] and "0.1" in said[0]


def test_hopeless_hessian_is_an_error():
    with pytest.raises(BarberError, match=r"mlp\.in.*samples"):
        sparsegpt.prepare(jnp.asarray([[jnp.nan, 0.0], [0.0, 1.0]], jnp.float32), 1, "mlp.in", print)


@pytest.mark.filterwarnings("error:.*cast:RuntimeWarning")
def test_updated_weights_that_do_not_fit_float16_are_named(tmp_path):
    write_model(tmp_path / "dense", dtype="float16")
    rng, name = np.random.default_rng(0), "model.layers.0.self_attn.v_proj.weight"
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors[name] = np.where(rng.random(tensors[name].shape) < 0.5, -6e4, 6e4).astype(np.float16)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    np.save(tmp_path / "ids.npy", rng.integers(0, 97, (4, 16)))
    options = ["--samples", 4, "--length", 16, "--method", "sparsegpt", "--no-rebuild"]
    with pytest.raises(BarberError, match=f"tensor {name} gets values that do not fit float16"):
        prune_masks(tmp_path / "out", tmp_path / "dense", tmp_path / "ids.npy", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "ids.npy"}


class TestSparseGPT(CriterionContract):
    method = "sparsegpt"
    options = ("--method", "sparsegpt", "--no-rebuild")
    group = (0, 1)
    # Column after column it turns rounding into other weights.
    mesh_agreement = 0.98
