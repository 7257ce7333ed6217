"""keep_pruned: whatever the optimizer, a pruned weight and what is remembered of it are exactly 0 after every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from barber_jax import BarberError, keep_pruned, zero_pruned

OPTIMIZERS = {
    "adamw": lambda rate, momentum, decay: optax.adamw(rate, b1=momentum, weight_decay=decay),
    "sgd": lambda rate, momentum, decay: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum, nesterov=True)
    ),
    # Factored second moments for the stack of matrices, whole ones for the matrix; both with momentum.
    "adafactor": lambda rate, momentum, decay: optax.adafactor(
        rate, momentum=momentum, weight_decay_rate=decay, min_dim_size_to_factor=6
    ),
    "clip, noise, adam": lambda rate, momentum, decay: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0), optax.adam(rate, b1=momentum)
    ),
    "MultiSteps": lambda rate, momentum, decay: optax.MultiSteps(optax.adamw(rate, momentum, weight_decay=decay), 2),
    "schedule": lambda rate, momentum, decay: optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(0.1, 0.0, 9), b1=momentum, weight_decay=decay
    ),
    "multi_transform": lambda rate, momentum, decay: optax.multi_transform(
        {"a": optax.adamw(rate, momentum, weight_decay=decay), "b": optax.sgd(rate, momentum)},
        {"layers": ["a", "b"], "norm": "b"},
    ),
    "lamb": lambda rate, momentum, decay: optax.lamb(rate, b1=momentum, weight_decay=decay),
}
SHAPES = {"layers": [{"kernel": (4, 8), "bias": (8,)}, {"kernel": (3, 6, 8)}], "norm": (8,)}


def fill(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


@functools.cache
def programs(name):
    """Jitted init and update of an optimizer; hyperparameters, masks and state are arguments."""

    def init(parameters, masks, settings):
        return keep_pruned(OPTIMIZERS[name](*settings), masks).init(parameters)

    def step(parameters, state, gradients, settings):
        optimizer = keep_pruned(OPTIMIZERS[name](*settings))
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return jax.jit(init), jax.jit(step)


def n_of_m(rng, shape, keep=2, of=4):
    """A mask [..., in, out] that keeps 2 of every 4 consecutive inputs of an output."""
    order = rng.random((*shape[:-2], shape[-2] // of, of, shape[-1])).argsort(axis=-2)
    return (order < keep).reshape(shape)


def masks_and_parameters(seed, structured=False):
    rng = np.random.default_rng(seed)
    kernels = {"kernel": n_of_m(rng, (4, 8)) if structured else rng.random((4, 8)) < 0.5, "bias": np.True_}
    masks = {"layers": [kernels, {"kernel": rng.random((3, 6, 8)) < 0.5}], "norm": np.True_}
    return masks, fill(lambda shape: rng.normal(size=shape).astype(np.float32)), rng


def assert_zeros(masks, tree, shapes):
    """Every array of the tree that has a mask's shape is 0 where that mask, and no other of the shape, prunes."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if leaf.dtype == np.float32]
    for mask in (mask for mask in jax.tree.leaves(masks) if np.ndim(mask)):
        same = [array for array in arrays if array.shape == mask.shape]
        assert len(same) >= shapes
        for array in same:
            assert not array[~mask].any()
            assert np.isfinite(array).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    structured=st.booleans(),
    rate=st.floats(1e-4, 1.0),
    momentum=st.floats(0.0, 0.99),
    decay=st.floats(0.0, 0.5),
    broken=st.booleans(),
)
def test_pruned_weights_and_their_moments_are_zero_at_every_step(name, seed, structured, rate, momentum, decay, broken):
    masks, dense, rng = masks_and_parameters(seed, structured)
    settings = tuple(map(np.float32, (rate, momentum, decay)))
    init, step = programs(name)
    parameters, state = dense, init(dense, masks, settings)
    assert_zeros(masks, state.inner, 0)
    for _ in range(4):
        gradients = fill(lambda shape: rng.normal(size=shape).astype(np.float32))
        if broken:
            # As a gradient through a weight that nothing reads may be.
            gradients["layers"][0]["kernel"][~masks["layers"][0]["kernel"]] = rng.choice([np.nan, np.inf])
        parameters, state = step(parameters, state, gradients, settings)
        # The dense parameters become sparse with the first step, in the middle of MultiSteps' round too.
        assert_zeros(masks, parameters, 1)
        assert_zeros(masks, state.inner, 0)
    # Kept weights have moved, all of them: the masks that they have in the end are those of the start.
    for path, mask in [((0, "kernel"), masks["layers"][0]["kernel"]), ((1, "kernel"), masks["layers"][1]["kernel"])]:
        before, after = dense["layers"][path[0]][path[1]], np.asarray(parameters["layers"][path[0]][path[1]])
        assert (before[mask] != after[mask]).mean() > 0.9
    if structured:
        kernel = np.asarray(parameters["layers"][0]["kernel"])
        assert ((kernel.reshape(1, 4, 8) != 0).sum(axis=1) == 2).all()


def test_moments_are_where_the_optimizers_keep_them():
    """The property above looks at shapes: these are the arrays that it must find."""
    masks, dense, _ = masks_and_parameters(0)
    found = {}
    for name in ("adamw", "sgd", "adafactor"):
        state = programs(name)[0](dense, masks, tuple(map(np.float32, (0.1, 0.9, 0.1))))
        shapes = [leaf.shape for leaf in jax.tree.leaves(state.inner)]
        found[name] = (shapes.count((4, 8)), shapes.count((3, 6, 8)))
    assert found == {"adamw": (2, 2), "sgd": (1, 1), "adafactor": (2, 1)}


def test_without_masks_it_is_the_optimizer():
    _, dense, rng = masks_and_parameters(0)
    gradients = fill(lambda shape: rng.normal(size=shape).astype(np.float32))
    plain, wrapped = optax.adamw(0.1), keep_pruned(optax.adamw(0.1), np.True_)
    expected, _ = plain.update(gradients, plain.init(dense), dense)
    given, _ = wrapped.update(gradients, wrapped.init(dense), dense)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_kept_weights_are_trained_as_if_pruned_ones_did_not_exist():
    """Adam on the kept weights alone, as one vector, gives the same weights, clipping included."""
    masks, dense, rng = masks_and_parameters(0)
    sparse = zero_pruned(masks, dense)
    full = jax.tree.map(lambda mask, leaf: np.broadcast_to(mask, leaf.shape), masks, sparse)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))
    wrapped, gather = keep_pruned(optimizer, masks), lambda tree: jax.tree.map(lambda m, leaf: leaf[m], full, tree)
    alone, state, vectors = optimizer.init(gather(sparse)), wrapped.init(sparse), gather(sparse)
    for _ in range(3):
        gradients = fill(lambda shape: rng.normal(size=shape).astype(np.float32))
        updates, state = wrapped.update(gradients, state, sparse)
        sparse = optax.apply_updates(sparse, updates)
        updates, alone = optimizer.update(gather(gradients), alone, vectors)
        vectors = optax.apply_updates(vectors, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), gather(sparse), vectors)


def test_masks_are_arguments_of_the_program_not_constants_in_it():
    masks, dense, _ = masks_and_parameters(0)
    optimizer = keep_pruned(optax.adamw(0.1), masks)
    state = optimizer.init(dense)
    program = jax.make_jaxpr(optimizer.update)(dense, state, dense)
    assert not [constant for constant in program.consts if np.size(constant) > 1]
    assert len(jax.tree.leaves(state.masks)) == len(jax.tree.leaves(dense))
    np.testing.assert_array_equal(state.masks["layers"][0]["kernel"], masks["layers"][0]["kernel"])


def test_masks_given_to_each_update():
    masks, dense, _ = masks_and_parameters(0)
    own, later = keep_pruned(optax.adamw(0.1), masks), keep_pruned(optax.adamw(0.1))
    state = later.init(zero_pruned(masks, dense))
    assert state.masks is None
    expected, _ = own.update(dense, own.init(dense), dense)
    given, state = jax.jit(lambda masks, *rest: later.update(*rest, masks=masks))(masks, dense, state, dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), given, expected)
    assert state.masks is None
    with pytest.raises(BarberError, match="no masks"):
        later.update(dense, state, dense)


def test_bfloat16_parameters_become_exactly_zero():
    masks, dense, _ = masks_and_parameters(0)
    optimizer = keep_pruned(optax.sgd(0.1), masks)
    for parameters, gradients in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        dense = jax.tree.map(lambda leaf, to=parameters: jnp.asarray(leaf, to), dense)
        updates, _ = optimizer.update(
            jax.tree.map(lambda leaf, to=gradients: leaf.astype(to), dense), optimizer.init(dense), dense
        )
        sparse = optax.apply_updates(dense, updates)
        assert not np.asarray(sparse["layers"][0]["kernel"])[~masks["layers"][0]["kernel"]].any()


def test_extra_arguments_reach_the_optimizer():
    masks, dense, _ = masks_and_parameters(0)
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append(value)
        return updates, state

    optimizer = keep_pruned(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), masks)
    optimizer.update(dense, optimizer.init(dense), dense, value=3.0)
    assert seen == [3.0]


def test_flax_module_and_its_optimizer():
    """Masks as a plain dict, a list where the module has one, under nnx.jit and with the state donated."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](jax.nn.relu(self.layers[0](x)))

    model, mask = Net(nnx.Rngs(0)), np.random.default_rng(0).random((8, 8)) < 0.5
    masks = {"layers": [{"kernel": mask, "bias": np.True_}, np.True_]}
    optimizer = nnx.Optimizer(model, keep_pruned(optax.adamw(0.1), masks), wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((2, 8))) ** 2).sum())(model))

    for _ in range(2):
        step(model, optimizer)
        for kernel in (
            model.layers[0].kernel,
            optimizer.opt_state.inner[0].mu["layers"][0]["kernel"],
            optimizer.opt_state.inner[0].nu["layers"][0]["kernel"],
        ):
            assert not np.asarray(kernel[...])[~mask].any()
            assert np.asarray(kernel[...])[mask].any()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": {"kernel": np.ones((3, 2), bool)}}, r"mask a.kernel has shape \[3, 2\], its parameter \[2, 3\]"),
        ({"b": np.True_}, "mask b has no parameter"),
        ({"a": {"kernel": np.ones((2, 3), np.int8)}}, "dtype int8, not bool"),
        ({"a": np.False_}, "mask a is one False"),
        ({}, "parameter a.kernel has no mask"),
    ],
    ids=["transposed", "unknown", "dtype", "false", "missing"],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(BarberError, match=message):
        keep_pruned(optax.sgd(0.1), masks).init({"a": {"kernel": jnp.ones((2, 3))}})
