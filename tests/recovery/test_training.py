"""A step of training: Adam as it is written down, with pruned weights and what is remembered of them exactly 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_models import IDS, assert_close, copied, plain_loss, plain_merge, whole

from barber_jax.masks.keep_pruned import zero_pruned
from barber_jax.recovery import training
from barber_jax.recovery.training import B1, B2, learning_rates, train_step


@pytest.fixture(scope="module")
def models(tiny):
    return functools.cache(lambda pattern="unstructured": whole(tiny(), pattern=pattern))


def step(model, plan, state, scales, frozen, ids, rate=0.01, micro_batch=4):
    rows = ids.reshape(-1, micro_batch, ids.shape[-1])
    return train_step(plan, state, scales, frozen, model.masks, model.dense, rows, np.float32(rate))


def kernels(state, plan, frozen, model):
    return training.final_kernels(state.values, frozen, model.masks, plan.mesh)


def remembered(state):
    """Every array of the optimizer's state, by the name of the parameter that it belongs to."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]:
        found.setdefault(getattr(path[-1], "key", None), []).append(leaf)
    return found


def test_two_steps_are_adam_of_the_kept_weights(models):
    """Clipped, with bias correction, a rate relative to each matrix; the gradient is the mean over micro-batches."""
    model, rates, clip = models(), (0.02, 0.01), 0.5
    objective = model.objective(0.5)
    plan, state, scales, frozen = model.begin(objective, "all", clip=clip)
    values = copied(state.values)
    first, second = (jax.tree.map(jnp.zeros_like, values) for _ in range(2))

    def loss(values, ids):
        return plain_loss(objective.program, values, model.dense, ids, 0.5)[0]

    gradient_of, masks = jax.jit(jax.value_and_grad(loss)), model.masks
    for number, rate in enumerate(rates, 1):
        state, metrics = step(model, plan, state, scales, frozen, IDS[number], rate, micro_batch=2)
        expected, gradient = gradient_of(values, IDS[number])
        gradient = {name: np.where(masks.get(name, True), value, 0) for name, value in gradient.items()}
        norm = np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in gradient.values()))
        assert norm > clip, "or clipping would not show"
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        for name, value in gradient.items():
            value = value * (clip / norm)
            first[name] = B1 * first[name] + (1 - B1) * value
            second[name] = B2 * second[name] + (1 - B2) * value**2
            change = (first[name] / (1 - B1**number)) / (np.sqrt(second[name] / (1 - B2**number)) + 1e-8)
            values[name] = values[name] - rate * scale_of(model, name) * np.where(masks.get(name, True), change, 0)
    assert int(state.step) == 2
    # Adam divides by the square root of a gradient that may be nearly 0: the moments are compared to rounding.
    after = remembered(state)
    assert_close({name: each[0] for name, each in after.items() if name}, first)
    assert_close({name: each[1] for name, each in after.items() if name}, second, 1e-4)
    for name, value in state.values.items():
        off = np.abs(np.asarray(value) - np.asarray(values[name]))
        assert np.quantile(off, 0.95) < 1e-3 * rates[0] * np.max(scale_of(model, name)), name


def scale_of(model, name):
    """Root mean square of each matrix's kept weights, of a parameter that is no matrix of all its values."""
    value = np.asarray(model.sparse[name], np.float64)
    if value.ndim == 3:
        kept = np.asarray(model.masks.get(name, np.ones(value.shape, bool)))
        return np.stack([np.sqrt(np.mean(v[k] ** 2)) for v, k in zip(value, kept, strict=True)])[:, None, None]
    return np.sqrt(np.mean(value**2))


def check_zeros(model, state, plan, frozen, scope, pattern):
    final = kernels(state, plan, frozen, model)
    moments = remembered(state)
    for name, mask in model.masks.items():
        pruned = ~np.asarray(mask)
        held = [final[name]] if scope == "lora" else [final[name], state.values[name], *moments[name]]
        assert len(held) == (1 if scope == "lora" else 4)
        for value in held:
            assert not np.asarray(value)[pruned].any(), name
        if pattern == "2:4":
            blocks, inputs, outputs = mask.shape
            groups = (np.asarray(final[name]) != 0).reshape(blocks, inputs // 4, 4, outputs)
            assert (groups.sum(2) <= 2).all(), name
    return final


def check_property(models, scope, pattern, mix, micro_batch, rate, spoilt):
    model = models(pattern)
    sparse = model.sparse
    if spoilt:
        # The checkpoint's weights may be anything where a mask file prunes more than is 0 in it.
        sparse = {**sparse, **{name: model.dense[name] for name in model.masks}}
    plan, state, scales, frozen = model.begin(model.objective(mix), scope, 4 if scope == "lora" else 0, sparse=sparse)
    frozen = zero_pruned(training.of_values(model.masks, frozen), frozen)
    before = check_zeros(model, state, plan, frozen, scope, pattern)
    for ids in IDS[:3]:
        state, _ = step(model, plan, state, scales, frozen, ids, rate, micro_batch)
        after = check_zeros(model, state, plan, frozen, scope, pattern)
    assert int(state.step) == 3
    for name, mask in model.masks.items():
        moved = (np.asarray(after[name]) != np.asarray(before[name]))[np.asarray(mask)]
        assert moved.mean() > 0.9, name


DRAWN = dict(
    scope=st.sampled_from(["weights", "all", "lora"]),
    pattern=st.sampled_from(["unstructured", "2:4"]),
    rate=st.floats(1e-4, 0.5),
    spoilt=st.booleans(),
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(**DRAWN)
def test_pruned_weights_and_moments_are_zero_at_every_step(models, **drawn):
    check_property(models, mix=0.5, micro_batch=4, **drawn)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(mix=st.sampled_from([0.0, 1.0]), micro_batch=st.sampled_from([1, 2, 4]), **DRAWN)
def test_pruned_weights_and_moments_are_zero_whatever_the_loss_and_micro_batches(models, **drawn):
    check_property(models, **drawn)


def test_low_rank_updates_are_merged_under_the_masks(models):
    model = models()
    plan, state, scales, frozen = model.begin(model.objective(0.5), "lora", 4)
    # Nothing has moved before the first step.
    begun = kernels(state, plan, frozen, model)
    for name in model.masks:
        np.testing.assert_array_equal(begun[name], model.sparse[name])
    state, _ = step(model, plan, state, scales, frozen, IDS[0], 0.1)
    assert_close(kernels(state, plan, frozen, model), plain_merge(frozen, state.values, model.masks))


@pytest.mark.parametrize("scope", ["weights", pytest.param("lora", marks=pytest.mark.slow)])
def test_micro_batches_change_nothing_but_rounding(scope, models):
    model, moments = models(), []
    for micro_batch in (4, 2, 1):
        plan, state, scales, frozen = model.begin(model.objective(0.5), scope, 4 if scope == "lora" else 0)
        state, metrics = step(model, plan, state, scales, frozen, IDS[0], 0.01, micro_batch)
        first = {name: each[0] for name, each in remembered(state).items() if name}
        moments.append((first, {name: float(value) for name, value in metrics.items()}))
    for first, metrics in moments[1:]:
        assert_close(first, moments[0][0])
        assert metrics == pytest.approx(moments[0][1], rel=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where, models):
    model = models()
    sparse = model.sparse
    if where == "loss":
        sparse["head.norm.scale"] = jnp.full_like(sparse["head.norm.scale"], jnp.nan)
    else:
        # All logits are 0, but the squares of the gradient of the head's kernel overflow.
        sparse["head.norm.scale"] = jnp.full_like(sparse["head.norm.scale"], 1e37)
        sparse["head.lm_head.kernel"] = jnp.zeros_like(sparse["head.lm_head.kernel"])
    plan, state, scales, frozen = model.begin(model.objective(0.5), "all", sparse=sparse)
    before = jax.tree.map(np.asarray, copied(state))
    after, metrics = step(model, plan, state, scales, frozen, IDS[1])
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert not np.isfinite(metrics["gradient_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_held_out_losses_are_of_weights_as_they_will_be_written(models):
    model = models()
    objective = model.objective(0.5)
    plan, state, _, frozen = model.begin(objective)
    dtypes = tuple((name, "bfloat16") for name in state.values)
    found = training.held_out_losses(plan, dtypes, state.values, frozen, model.masks, model.dense, IDS[:2])
    rounded = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in state.values.items()}
    losses = [plain_loss(objective.program, {**frozen, **rounded}, model.dense, ids, 0.5)[0] for ids in IDS[:2]]
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
@pytest.mark.parametrize("warm_up", [0.0, 0.05, 1.0])
def test_learning_rates(steps, warm_up):
    rates = learning_rates(0.01, steps, warm_up)
    rise = max(1, int(warm_up * steps))
    assert rates.shape == (steps,) and rates.dtype == np.float32
    assert (rates > 0).all() and rates.max() <= np.float32(0.01)
    assert (np.diff(rates[:rise]) > 0).all() and (np.diff(rates[rise:]) < 0).all()
    if steps == 1000 and warm_up < 1:
        assert rates.max() > 0.00999 and rates[-1] < 1e-5
