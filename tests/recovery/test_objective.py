"""The loss in chunks, and its gradient through scanned and rematerialised blocks, are those written plainly."""

import jax
import numpy as np
import pytest
from whole_models import IDS, assert_close, plain_loss, plain_merge, whole

from barber_jax.recovery import objective as module
from barber_jax.recovery import training
from barber_jax.recovery.lora import FIRST, SECOND

slow = pytest.mark.slow
CASES = [
    pytest.param("llama", {}, "all", 0.25, "all", id="llama, all, both losses"),
    pytest.param("llama", {}, "weights", None, "light", id="llama, weights, no teacher"),
    pytest.param("opt", {}, "all", None, "light", id="opt, all, no teacher"),
    pytest.param("llama", {"tie_word_embeddings": True}, "all", 0.0, "none", id="tied, all, teacher"),
    pytest.param(
        "llama", {"tie_word_embeddings": True}, "weights", 0.0, "none", id="tied, weights, teacher", marks=slow
    ),
    pytest.param("opt", {}, "weights", 0.5, "all", id="opt, weights, both losses", marks=slow),
    pytest.param("gemma3_text", {}, "all", 0.0, "light", id="two kinds of blocks, all, teacher"),
    pytest.param("qwen3", {}, "all", 1.0, "light", id="qwen3, all, cross-entropy", marks=slow),
]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """20 positions in chunks of 8 of 4 windows, so that the last chunk is part padding."""
    monkeypatch.setattr(module, "HEAD_TOKENS", 32)


@pytest.mark.parametrize(("family", "changes", "scope", "mix", "remat"), CASES)
def test_gradient_is_that_of_the_loss_written_plainly(family, changes, scope, mix, remat, tiny):
    model = whole(tiny(family, **changes))
    teacher = {} if mix is None else model.dense
    mix = 1.0 if mix is None else mix
    objective = model.objective(mix, remat)
    values, frozen = training.split(model.sparse, objective.program, scope)
    gradient, metrics = jax.jit(objective.gradient)(values, frozen, {}, teacher, IDS[0])

    def loss(values):
        return plain_loss(objective.program, {**frozen, **values}, teacher, IDS[0], mix)

    (expected, parts), reference = jax.jit(jax.value_and_grad(loss, has_aux=True))(values)
    assert_close(gradient, reference)
    for name, value in {"loss": expected, **parts}.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # Without the gradient it is the same loss.
    measured = jax.jit(objective.losses)({**frozen, **values}, {}, teacher, IDS[0])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), measured, metrics)


def test_gradient_of_low_rank_factors(tiny):
    model = whole(tiny())
    objective = model.objective(0.5)
    _, state, _, frozen = model.begin(objective, "lora", rank=3)
    # Where both factors are away from 0, both have a gradient.
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in state.values.items()}
    assert {name.rpartition(".")[2] for name in values} == {FIRST[1:], SECOND[1:]}
    gradient, metrics = jax.jit(objective.gradient)(values, frozen, model.masks, model.dense, IDS[0])

    def loss(values):
        parameters = {**frozen, **plain_merge(frozen, values, model.masks)}
        return plain_loss(objective.program, parameters, model.dense, IDS[0], 0.5)[0]

    expected, reference = jax.jit(jax.value_and_grad(loss))(values)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_close(gradient, reference)


def test_a_teacher_that_is_the_model_teaches_nothing(tiny):
    model = whole(tiny())
    objective = model.objective(0.0)
    gradient, metrics = jax.jit(objective.gradient)(model.dense, {}, {}, model.dense, IDS[0])
    assert abs(float(metrics["kl"])) < 1e-6 and float(metrics["loss"]) == float(metrics["kl"])
    assert max(float(np.abs(value).max()) for value in gradient.values()) < 1e-6
