"""Training of a sub-block's surviving weights towards its target (see targets.py).

Adam (arXiv 1412.6980) on float32 masters with a warmed-up cosine schedule. A matrix's learning rate is a fraction of
the root mean square of its surviving weights, so that one rate fits matrices of every scale. The gradient of
a pruned weight is zero, and the mask zeroes it whatever it holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from barber_jax.forward.passes import Parameters, sparsify
from barber_jax.forward.streams import Stream
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.sharding import DATA, constrain, kernel_axes
from barber_jax.stages.loss import TokenWeighting, error

B1, B2, WARM_UP = 0.9, 0.95, 0.05
MIN_SCALE = 1e-3
"""Lower bound of the root mean square that a learning rate is a fraction of: biases may all be zero."""


Scope = Literal["weights", "all"]


@dataclass(frozen=True)
class Plan:
    """How a sub-block is trained.

    Attributes:
        steps: number of optimizer steps.
        rate: peak learning rate, as a fraction of a matrix's root mean square.
        weighting: of tokens in the loss.
    """

    steps: int
    rate: float
    weighting: TokenWeighting

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the schedule, before each matrix's own scale."""
        warm_up = max(1, int(WARM_UP * self.steps))
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.rate, warm_up, max(self.steps, warm_up + 1))
        return optax.chain(optax.scale_by_adam(B1, B2), optax.scale_by_learning_rate(schedule))


@dataclass
class Training:
    """State of a training.

    Attributes:
        values: path -> float32 masters.
        scales: path -> float32 scalar, root mean square that the learning rate is a fraction of.
        optimizer: Adam's state.
    """

    values: Parameters
    scales: Parameters
    optimizer: optax.OptState


jax.tree_util.register_dataclass(Training, ["values", "scales", "optimizer"], [])


def trained_paths(definition: BlockDefinition, sub: SubBlock, scope: Scope) -> tuple[str, ...]:
    """Paths of the parameters that are trained: the sub-block's kernels, and for `all` its biases and norms too."""
    return sub.kernels if scope == "weights" else definition.paths(sub)


def _constrain(sub: SubBlock, values: Parameters) -> Parameters:
    return {path: constrain(v, *(kernel_axes(sub, path) if path in sub.kernels else ())) for path, v in values.items()}


@partial(jax.jit, static_argnames=("sub", "plan"))
def begin(sub: SubBlock, plan: Plan, values: Parameters, masks: dict[str, jax.Array]) -> Training:
    """State of a training before its first step.

    Args:
        values: path -> what is to be trained, any dtype. masks: kernel path -> bool [out, in].
    """
    values = {path: value.astype(jnp.float32) for path, value in values.items()}

    def scale(path: str) -> jax.Array:
        kept = masks[path].T if path in masks else jnp.ones(values[path].shape, bool)
        squares = jnp.sum(jnp.where(kept, jnp.square(values[path]), 0.0))
        return constrain(jnp.maximum(jnp.sqrt(squares / jnp.maximum(jnp.sum(kept), 1)), MIN_SCALE))

    return Training(_constrain(sub, values), {path: scale(path) for path in values}, plan.optimizer().init(values))


@partial(jax.jit, static_argnames=("definition", "sub", "plan"), donate_argnames="training")
def train(
    definition: BlockDefinition,
    sub: SubBlock,
    plan: Plan,
    parameters: Parameters,
    masks: dict[str, jax.Array],
    stream: jax.Array,
    target: jax.Array,
    order: jax.Array,
    training: Training,
) -> Training:
    """Run some steps of a training.

    Args:
        parameters: of the block; the trained ones are taken from `training`.
        masks: kernel path -> bool [out, in], of the sub-block.
        stream, target: [M, B, L, D], from which each step takes its samples.
        order: int32 [T, P, b, 2], indices into M and B of the samples of each of T steps, in P parts of b samples. The
            gradients of the parts are averaged; one part's activations are in memory at a time.
        training: before these steps. Consumed.
    """
    optimizer = plan.optimizer()

    def loss(values: Parameters, hidden: jax.Array, wanted: jax.Array) -> jax.Array:
        block = definition.bind(sparsify({**parameters, **values}, masks))
        y = block.apply(sub.name, block.enter(sub.name, hidden))
        return error(block, hidden, y, wanted, plan.weighting)

    def step(training: Training, samples: jax.Array) -> tuple[Training, None]:
        def part(total: Parameters, places: jax.Array) -> tuple[Parameters, None]:
            chosen = (places[:, 0], places[:, 1])
            hidden, wanted = constrain(stream[chosen], DATA), constrain(target[chosen], DATA)
            gradient = jax.grad(loss)(training.values, hidden, wanted)
            return _constrain(sub, jax.tree.map(jnp.add, total, gradient)), None

        total, _ = lax.scan(part, jax.tree.map(jnp.zeros_like, training.values), samples)
        mean = jax.tree.map(lambda g: g / samples.shape[0], total)
        updates, state = optimizer.update(mean, training.optimizer, training.values)
        values = {path: v + training.scales[path] * updates[path] for path, v in training.values.items()}
        return Training(_constrain(sub, values), training.scales, state), None

    return lax.scan(step, training, order)[0]


@jax.jit
def rounded(values: Parameters, like: Parameters) -> Parameters:
    """Master weights in the dtypes of the parameters they replace, as they will be written."""
    return {path: value.astype(like[path].dtype) for path, value in values.items()}


def schedule(samples: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Samples of each step, int [steps, batch]: epochs over all samples, each in a random order of its own."""
    rng = np.random.default_rng(seed)
    rounds = -(-steps * batch // samples)
    return np.concatenate([rng.permutation(samples) for _ in range(rounds)])[: steps * batch].reshape(steps, batch)


def batches(
    stream: Stream, target: Stream, chosen: np.ndarray, multiple: int
) -> Iterator[tuple[jax.Array, jax.Array, np.ndarray]]:
    """The arguments of `train` for some steps: a stream, its target, and the order of samples.

    Args:
        chosen: int [T, K] samples of each step.
        multiple: a part of a step's samples is spread over so many devices; divides K.

    Yields:
        stream [M, B, L, D], target, and order [T, P, b, 2]: once where the streams are on the device; where they are
        offloaded, for each step with its own samples alone.
    """
    size = stream.micro_batch
    part = max(b for b in range(multiple, max(size, multiple) + 1, multiple) if chosen.shape[1] % b == 0)
    if not stream.offloaded:
        places = np.stack(np.divmod(chosen, size), axis=-1)
        (hidden,), (wanted,) = stream, target
        yield hidden, wanted, places.reshape(len(chosen), -1, part, 2).astype(np.int32)
        return
    alone = np.stack([np.zeros_like(chosen[0]), np.arange(chosen.shape[1])], axis=-1)
    for step in chosen:
        gathered = (_gather([_sample(each.at(s // size), s % size) for s in step]) for each in (stream, target))
        yield (*gathered, alone.reshape(1, -1, part, 2).astype(np.int32))


@jax.jit
def _sample(chunk: jax.Array, place: int) -> jax.Array:
    """One sample [L, D] of a micro-batch [1, B, L, D]."""
    return lax.dynamic_index_in_dim(chunk[0], place, keepdims=False)


@jax.jit
def _gather(samples: list[jax.Array]) -> jax.Array:
    """Samples [L, D] -> [1, K, L, D]."""
    return constrain(jnp.stack(samples)[None], None, DATA)
