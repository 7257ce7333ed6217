"""The backward sweep, block by block, against jax.grad of the whole model; and what it keeps in memory."""

import gc
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FAMILIES, write_model

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.devices.mesh import Devices
from barber_jax.forward import cotangents, passes
from barber_jax.forward.sweep import Wanted, boundary_interval, sweep
from barber_jax.models import build_model

IDS = np.random.default_rng(7).integers(0, 97, (2, 2, 12)).astype(np.int32)
BOTH = Wanted(norm="l2", tokens=True)


def opened(folder):
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, build_model(checkpoint.config, jnp.dtype("float32"))


def swept(folder, wanted=BOTH, devices=None, ids=IDS, **options):
    """index -> (weights, tokens, cotangent [S, L, D])."""
    checkpoint, model = opened(folder)
    devices = devices or Devices()
    with devices.context():
        return {
            index: (
                found.weights,
                found.tokens,
                np.concatenate([np.asarray(chunk) for chunk in found.cotangent]).reshape(
                    -1, ids.shape[2], model.hidden
                ),
            )
            for index, found in sweep(checkpoint, model, ids, devices, wanted, **options)
        }


def plain(folder, labels):
    """Of one sample: gradient of its summed cross-entropy with respect to every parameter of the blocks, and to what
    is added to the hidden states and to the linears' outputs; the whole model in one piece.

    Args:
        labels: int32 [S, L] labels; negative where there is none.
    """
    checkpoint, model = opened(folder)
    embed, head = (model.embed(), model.names.embed), (model.head(), model.names.head)
    embed, head = (definition.bind(read_parameters(checkpoint, names)) for definition, names in (embed, head))
    blocks = [read_parameters(checkpoint, model.names.of_block(index)) for index in range(model.layers)]
    linears = [linear for sub in model.sub_blocks for linear, _ in sub.linears]

    def loss(blocks, added, biases, ids, labels):
        hidden = embed(ids[None])
        for index, (parameters, extra, bias) in enumerate(zip(blocks, added, biases, strict=True)):
            bound = model.block(index).bind(parameters)
            for linear, value in bias.items():
                module = getattr(bound, linear.split(".")[0])
                apply = getattr(module, linear.split(".")[1])
                setattr(module, linear.split(".")[1], lambda x, apply=apply, value=value: apply(x) + value)
            hidden = bound.run(model.sub_blocks, hidden + extra)
        chances = jax.nn.log_softmax(head(hidden)[0])
        chosen = jnp.take_along_axis(chances, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
        return -jnp.sum(jnp.where(labels >= 0, chosen, 0.0))

    length = IDS.shape[2]
    shapes = dict(model.block().shapes)
    added = [jnp.zeros((1, length, model.hidden))] * model.layers
    biases = [{linear: jnp.zeros((1, length, shapes[f"{linear}.kernel"][1])) for linear in linears}] * model.layers
    every = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (None, None, None, 0, 0)))
    return every(blocks, added, biases, IDS.reshape(-1, length), labels)


def next_tokens():
    ids = IDS.reshape(-1, IDS.shape[2])
    return np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def assert_close(ours, reference):
    """To a share of 1e-5 of the largest value: single ones may cancel."""
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * float(np.abs(reference).max()))


def check(found, reference, norm, labels=IDS.shape[2] - 1):
    kernels, added, biases = reference
    for index, (weights, tokens, cotangent) in found.items():
        assert_close(cotangent, added[index][:, 0])
        for path, weight in weights.items():
            each = np.asarray(kernels[index][path], np.float64) / labels
            assert each.shape[0] == 4 and np.abs(each).max() > 0
            wanted = np.abs(each).mean(0) if norm == "l1" else np.sqrt(np.square(each).mean(0))
            assert_close(weight, wanted)
        for path, squares in tokens.items():
            of_output = np.asarray(biases[index][path.removesuffix(".kernel")], np.float64)[:, 0]
            assert_close(squares, np.square(of_output).mean(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family, tiny):
    found, reference = swept(tiny(family)), plain(tiny(family), next_tokens())
    assert list(found) == [1, 0]
    assert {len(part) for found in found.values() for part in found[:2]} == {6 if family == "opt" else 7}
    check(found, reference, "l2")
    if family == "llama":
        absolute = swept(tiny(family), Wanted(norm="l1"))
        assert all(not tokens for _, tokens, _ in absolute.values())
        check(absolute, reference, "l1")


class Identity:
    """A head whose logits are the hidden states."""

    shapes = (("lm_head.kernel", (4, 4)),)

    def bind(self, parameters):
        return lambda hidden: hidden


def test_labels_are_drawn_from_the_models_own_distribution():
    """The cotangent of logits is softmax - 1 at the label; 300 positions are more than a chunk of the head."""
    chances = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    hidden = jnp.tile(jnp.log(chances), (2, 2, 300, 1))
    ids = jnp.zeros((2, 2, 300), jnp.int32)
    found = np.asarray(
        cotangents.top(Identity(), {}, hidden, ids, "model", jnp.array([0, 5], jnp.uint32), jnp.int32(0))
    )
    labels = chances - found
    np.testing.assert_allclose(labels, np.eye(4)[labels.argmax(-1)], atol=1e-6)
    frequencies = labels.reshape(-1, 4).mean(0)
    assert np.abs(frequencies - chances).max() < 4 * np.sqrt(0.25 / 1200)
    # Every sample has its own.
    assert len({sample.tobytes() for sample in labels.argmax(-1).reshape(4, 300)}) == 4
    given = np.asarray(cotangents.top(Identity(), {}, hidden, ids, "data", jnp.array([0, 5], jnp.uint32), jnp.int32(0)))
    np.testing.assert_allclose(
        given[:, :, :-1] - chances, np.broadcast_to([-1, 0, 0, 0], given[:, :, :-1].shape), atol=1e-6
    )
    assert not given[:, :, -1].any()


def test_a_seed_draws_the_same_labels_however_samples_are_put_together(tiny):
    (_, _, one), (_, _, other), (_, _, unlike) = (
        swept(tiny(), Wanted(labels="model", seed=seed), ids=ids)[0]
        for seed, ids in ((3, IDS), (3, IDS.reshape(4, 1, -1)), (4, IDS))
    )
    assert_close(other, one)
    assert np.abs(unlike - one).max() > 0.1 * np.abs(one).max()


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Folder of a model of this many blocks."""

    def model(blocks, *family, **changes):
        folder = tmp_path_factory.mktemp("deep")
        write_model(folder, *family, num_hidden_layers=blocks, **changes)
        return folder

    return model


def test_recomputing_and_offloading_change_nothing(deep, monkeypatch):
    # Every other block attends to a window.
    folder = deep(5, "gemma3_text", layer_types=None, sliding_window_pattern=2)
    assert opened(folder)[1].blocks().kinds == (0, 1, 0, 1, 0)
    plainly = swept(folder, every=1)
    assert list(plainly) == [4, 3, 2, 1, 0]
    # Without `every` as many streams are kept as fit.
    monkeypatch.setattr("barber_jax.forward.sweep.available_bytes", lambda: 1)
    for options in ({}, {"every": 2}, {"every": 7}, {"offload": True}, {"offload": True, "every": 2}):
        found = swept(folder, **options)
        for index, (weights, tokens, cotangent) in plainly.items():
            np.testing.assert_array_equal(found[index][2], cotangent)
            for ours, reference in ((found[index][0], weights), (found[index][1], tokens)):
                assert all((ours[path] == value).all() for path, value in reference.items()), options


def test_a_mesh_gives_the_gradients_of_one_device(tiny):
    one, many = swept(tiny()), swept(tiny(), devices=Devices.of((2, 2)))
    for index, (weights, tokens, cotangent) in one.items():
        assert_close(many[index][2], cotangent)
        for ours, reference in ((many[index][0], weights), (many[index][1], tokens)):
            assert all(assert_close(ours[path], value) is None for path, value in reference.items())


def test_device_memory_does_not_grow_with_depth(deep, monkeypatch):
    """Bytes of all arrays on the device, before each block's forward and backward pass; in host memory grows what is
    kept, as k says."""
    peaks, kept = [], []

    def measured(function):
        def call(*arguments):
            live = jax.live_arrays()
            peaks.append(sum(array.nbytes for array in live if array.sharding.memory_kind == "device"))
            kept.append(sum(array.nbytes for array in live if array.sharding.memory_kind == "pinned_host"))
            return function(*arguments)

        return call

    monkeypatch.setattr(cotangents, "backward", measured(cotangents.backward))
    monkeypatch.setattr(passes, "propagate", measured(passes.propagate))
    found = {}
    for blocks, every in ((8, 1), (32, 1), (8, 2)):
        checkpoint, model = opened(deep(blocks))
        gc.collect()
        base = sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == "device")
        # On a CPU what is yielded is a view of arrays on the device.
        deque(sweep(checkpoint, model, IDS, Devices(), BOTH, every=every), maxlen=0)
        found[blocks, every] = (max(peaks) - base, max(kept) // (IDS.size * model.hidden * 4))
        peaks.clear(), kept.clear()
    assert found[8, 1][0] == found[32, 1][0] == found[8, 2][0] > 0
    assert [held for _, held in found.values()] == [8, 32, 4 + 1]


def test_the_interval_is_the_least_that_fits():
    assert boundary_interval(32, 10, None) == 1
    assert boundary_interval(32, 10, 320) == 1
    assert boundary_interval(32, 10, 319) == 2  # 16 + 1
    assert boundary_interval(32, 10, 110) == 4  # 8 + 3
    # Nothing fits: 6 boundaries and 5 streams between them, or as few otherwise.
    assert boundary_interval(32, 10, 0) == min(range(1, 33), key=lambda k: -(-32 // k) + k - 1)
    assert boundary_interval(1, 10, 0) == 1


def test_an_overflow_is_reported(tiny, monkeypatch):
    def infinite(definition, parameters, hidden, *rest):
        return jnp.full_like(hidden, jnp.inf)

    monkeypatch.setattr(cotangents, "top", infinite)
    with pytest.raises(BarberError, match="block 1: the gradients of the dense model's loss are not finite"):
        swept(tiny())
