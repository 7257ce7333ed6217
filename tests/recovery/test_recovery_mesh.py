"""Fully sharded training on eight virtual devices gives the losses of one, and holds no large array whole."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import write_model
from whole_models import whole

from barber_jax.devices.mesh import Devices
from barber_jax.recovery import cost
from barber_jax.recovery import program as module
from barber_jax.recovery.program import ALL
from barber_jax.recovery.training import train_step

SMALL = 100
IDS = np.random.default_rng(7).integers(0, 97, (20, 1, 8, 20)).astype(np.int32)
"""20 steps of one micro-batch of 8 windows."""


@pytest.fixture(scope="module", autouse=True)
def everything_is_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", SMALL)
        yield


def train(folder, mesh, scope):
    """Losses of 20 steps, and the arrays that the training holds after them, by what they are."""
    devices = Devices.of(mesh)
    with devices.context():
        model = whole(folder, devices)
        rank = 4 if scope == "lora" else 0
        objective = model.objective(0.5, devices=len(devices.used))
        plan, state, scales, frozen = model.begin(objective, scope, rank, devices.shape)
        losses = []
        for ids in IDS:
            given = devices.put(ids, None, ALL)
            rate = np.float32(0.01)
            state, metrics = train_step(plan, state, scales, frozen, model.masks, model.dense, given, rate)
            losses.append(float(metrics["loss"]))
    held = {"parameters": state.values, "moments": state.optimizer, "frozen": frozen, "masks": model.masks}
    return losses, {**held, "teacher": model.dense}


@pytest.fixture(scope="module")
def alone(tiny):
    return functools.cache(lambda scope: train(tiny(), None, scope)[0])


@pytest.mark.parametrize(
    ("mesh", "scope"), [((2, 4), "all"), *(pytest.param((8, 1), s, marks=pytest.mark.slow) for s in ("all", "lora"))]
)
def test_losses_of_one_device_and_nothing_large_is_replicated(mesh, scope, alone, tiny):
    losses, held = train(tiny(), mesh, scope)
    np.testing.assert_allclose(losses, alone(scope), atol=1e-4, rtol=0)
    assert losses[-1] < losses[0]
    for what, tree in held.items():
        sharded = 0
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
            # The blocks' axis is scanned over.
            axes = value.shape[value.ndim == 3 :]
            if value.size >= SMALL and any(axis % 8 == 0 for axis in axes):
                sharded += 1
                assert 8 * np.prod(value.sharding.shard_shape(value.shape)) == value.size, (what, path)
        assert sharded or what == "frozen", what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "scope", "remat"),
    [((2, 4), "weights", "all"), ((2, 4), "weights", "light"), ((8, 1), "all", "all"), ((8, 1), "lora", "all")],
)
def test_memory_of_the_compiled_step(mesh, scope, remat, tmp_path, optimized):
    """What XLA plans for each device is what the arithmetic says; gradients held whole would make it far more."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=12, vocab_size=1024)
    write_model(tmp_path, num_attention_heads=4, num_key_value_heads=4, dtype="bfloat16", **sizes)
    # Long enough that products would show.
    devices, length = Devices.of(mesh), 512 if remat == "light" else 32
    with devices.context():
        model = whole(tmp_path, devices)
        objective = model.objective(0.5, remat, devices=8)
        rank = 16 if scope == "lora" else 0
        plan, state, scales, frozen = model.begin(objective, scope, rank, devices.shape)
        ids = devices.put(np.zeros((2, 8, length), np.int32), None, ALL)
        arguments = (state, scales, frozen, model.masks, model.dense, ids, np.float32(0.1))
        planned = train_step.lower(plan, *arguments).compile().memory_analysis()
    given = dict(devices=8, micro_batch=8, length=length, scope=scope, rank=16, remat=remat)
    said = cost.memory(model.model, **given, stored="bfloat16", compute="float32")
    arguments = said.masters + said.moments + said.masks + said.frozen + said.teacher
    # Small arrays are replicated: norms, and the ids.
    assert arguments <= planned.argument_size_in_bytes <= 1.05 * arguments + 65536
    rest = said.gradients + said.gathered + said.activations + said.logits
    assert 0.7 * rest <= planned.temp_size_in_bytes <= 1.3 * rest
