"""Tiny whole models for the tests of recovery, their masks and text, and the same mathematics written plainly."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.recovery import training
from barber_jax.recovery.objective import Objective
from barber_jax.recovery.program import BLOCKS, EMBED, HEAD, Program, load, part, put

IDS = np.random.default_rng(5).integers(0, 97, (4, 4, 20)).astype(np.int32)
"""Token ids of 4 steps of 4 windows of 20 tokens."""


@dataclass(frozen=True)
class Whole:
    """A tiny model on the devices, without and with its pruned weights, and its masks."""

    model: Model
    dense: dict
    masks: dict

    @property
    def sparse(self):
        return {**self.dense, **{name: jnp.where(mask, self.dense[name], 0) for name, mask in self.masks.items()}}

    def objective(self, mix=1.0, remat="all", devices=1):
        return Objective(Program.of(self.model, remat), mix, devices)

    def begin(self, objective, scope="weights", rank=0, mesh=(1, 1), clip=1.0, sparse=None):
        """(plan, state, scales, frozen) of a training."""
        trained, frozen = training.split(sparse or self.sparse, objective.program, scope)
        plan = training.Plan(objective, clip, mesh)
        return plan, *training.begin(plan, trained, frozen, self.masks, rank, 0), frozen


def whole(folder, devices=None, pattern="unstructured"):
    """The model of a folder with random masks of half of its prunable weights."""
    checkpoint, devices = open_checkpoint(str(folder)), devices or Devices()
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    dense = load(checkpoint, model, devices)
    rng = np.random.default_rng(3)
    shapes = {name: dense[name].shape for name in Program.of(model).kernels}
    masks = {name: random_mask(rng, shape, pattern) for name, shape in shapes.items()}
    return Whole(model, dense, {name: put(name, mask, devices) for name, mask in masks.items()})


def random_mask(rng, shape, pattern):
    """bool [N, in, out]; of 2:4, two of every four consecutive inputs of an output are kept."""
    if pattern == "unstructured":
        return rng.random(shape) < 0.5
    blocks, inputs, outputs = shape
    order = rng.random((blocks, inputs // 4, 4, outputs)).argsort(axis=2)
    return (order < 2).reshape(shape)


def copied(tree):
    """A copy that survives the donation of the original."""
    return jax.tree.map(jnp.copy, tree)


def plain_logits(program, parameters, ids):
    """float32 logits [B, L, V], one block after the other, nothing in chunks and nothing computed again."""
    hidden = program.embed.bind(part(parameters, EMBED))(ids)
    blocks = part(parameters, BLOCKS)
    for index in range(next(iter(blocks.values())).shape[0]):
        hidden = program.blocks[index].run({path: value[index] for path, value in blocks.items()}, hidden)
    head = part(parameters, HEAD)
    if program.tied:
        head = {**head, program.tied[0]: parameters[EMBED + program.tied[1]].T}
    return program.head.bind(head)(hidden)


def plain_loss(program, parameters, teacher, ids, mix):
    """(1 - mix) KL(dense || sparse) + mix cross-entropy, of the tokens that have a next one; and both."""
    ours = jax.nn.log_softmax(plain_logits(program, parameters, ids)[:, :-1])
    entropy = -jnp.mean(jnp.take_along_axis(ours, ids[:, 1:, None], -1))
    kl = jnp.zeros(())
    if teacher:
        theirs = jax.nn.log_softmax(lax.stop_gradient(plain_logits(program, teacher, ids)[:, :-1]))
        kl = jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), -1))
    return (1 - mix) * kl + mix * entropy, {"kl": kl, "cross_entropy": entropy}


def plain_merge(frozen, factors, masks):
    """LoRA: W + rms(W) / sqrt(r) A B of every matrix, its pruned weights at 0."""
    merged = {}
    for name, mask in masks.items():
        first, second = factors[f"{name}.lora_in"], factors[f"{name}.lora_out"]
        layers = []
        for index, kept in enumerate(np.asarray(mask)):
            weight = np.asarray(frozen[name])[index]
            scale = np.sqrt(np.mean(np.square(weight.astype(np.float64))[kept])) / np.sqrt(first.shape[-1])
            layers.append(kept * (weight + np.float32(scale) * (first[index] @ second[index])))
        merged[name] = jnp.stack(layers)
    return merged


def assert_close(ours, reference, share=2e-5):
    """Every array is that of the reference, to a share of the largest value of all of them.

    The gradient of OPT's key biases is 0 in exact arithmetic, so that rounding is all that there is of it.
    """
    assert ours.keys() == reference.keys()
    scale = max(float(np.abs(value).max()) for value in reference.values())
    assert scale > 0
    for name, value in ours.items():
        np.testing.assert_allclose(value, reference[name], rtol=0, atol=share * scale, err_msg=name)
