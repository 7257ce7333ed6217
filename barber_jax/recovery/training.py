"""One optimizer step of a recovery: gradient of a batch, Adam, and updates that keep pruned weights at zero.

Masters, gradients and moments are float32 and sharded as the parameters are. As in reconstruction, a matrix's learning
rate is a fraction of the root mean square of its surviving weights.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from barber_jax.forward.passes import Parameters
from barber_jax.masks.keep_pruned import keep_pruned, zero_pruned
from barber_jax.models.sharding import constrain
from barber_jax.recovery import lora
from barber_jax.recovery.objective import Metrics, Objective
from barber_jax.recovery.program import ALL, Program, shard

B1, B2, EPSILON = 0.9, 0.95, 1e-8
MIN_SCALE = 1e-3
"""Lower bound of the root mean square that a learning rate is a fraction of: biases may all be zero."""

Scope = Literal["weights", "all", "lora"]


@dataclass(frozen=True)
class Plan:
    """What a step computes; hashable.

    Attributes:
        objective: the loss.
        clip: largest norm of the gradient of all parameters together.
        mesh: sizes of the mesh axes.
    """

    objective: Objective
    clip: float
    mesh: tuple[int, int] = (1, 1)

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Adam, of which `train_step` takes the moments. Its updates are given masks."""
        return keep_pruned(optax.scale_by_adam(B1, B2, EPSILON))


def learning_rates(rate: float, steps: int, warm_up: float) -> np.ndarray:
    """Learning rate of each step, float32 [steps]: a linear rise in a share `warm_up` of them, then a cosine to 0."""
    rise = max(1, int(warm_up * steps))
    schedule = optax.warmup_cosine_decay_schedule(rate / rise, rate, rise, max(steps, rise + 1))
    return np.asarray(schedule(np.arange(steps)), np.float32)


@dataclass
class State:
    """State of a training.

    Attributes:
        values: name -> float32 masters of what is trained.
        optimizer: the optimizer's state.
        step: int32, number of steps done.
    """

    values: Parameters
    optimizer: optax.OptState
    step: jax.Array


jax.tree_util.register_dataclass(State, ["values", "optimizer", "step"], [])


def split(parameters: Parameters, program: Program, scope: Scope) -> tuple[Parameters, Parameters]:
    """Divide a model's parameters into those that are trained and those that are not.

    For `lora` none of the model's own are trained.
    """
    trained = {"weights": program.kernels, "all": tuple(parameters), "lora": ()}[scope]
    return (
        {name: value for name, value in parameters.items() if name in trained},
        {name: value for name, value in parameters.items() if name not in trained},
    )


def of_values(masks: Parameters, values: Parameters) -> Parameters:
    """Masks for `keep_pruned` and `zero_pruned`: of each value its mask, or True."""
    return {name: masks.get(name, np.True_) for name in values}


@partial(jax.jit, static_argnames=("plan", "rank", "seed"))
def begin(
    plan: Plan, trained: Parameters, frozen: Parameters, masks: Parameters, rank: int = 0, seed: int = 0
) -> tuple[State, Parameters]:
    """State before the first step, and the scales of the learning rates.

    Args:
        trained: parameters to train; {} to train low-rank factors of the prunable kernels in `frozen`.
        masks: kernel name -> bool [N, in, out].
        rank: of the factors.
        seed: of their start.
    """
    values = {name: value.astype(jnp.float32) for name, value in trained.items()}
    values = zero_pruned(of_values(masks, values), values)
    scales = {
        name: jnp.maximum(lora.root_mean_square(value, masks.get(name)), MIN_SCALE) for name, value in values.items()
    }
    if rank:
        keys = jax.random.split(jax.random.key(seed), len(plan.objective.program.kernels))
        for name, key in zip(plan.objective.program.kernels, keys, strict=True):
            first, second = lora.begin(frozen[name], rank, key)
            values |= {name + lora.FIRST: first, name + lora.SECOND: second}
        scales = {name: jnp.ones((), jnp.float32) for name in values}
    values = shard(values, plan.mesh)
    state = plan.optimizer().init(values)
    return State(values, _shard_state(state, plan.mesh), constrain(jnp.zeros((), jnp.int32))), jax.tree.map(
        constrain, scales
    )


def _shard_state(state: optax.OptState, mesh: tuple[int, int]) -> optax.OptState:
    """Shard every dict of the optimizer's state that has the trained values' names."""

    def is_named(node: object) -> bool:
        return isinstance(node, dict)

    return jax.tree.map(lambda node: shard(node, mesh) if is_named(node) else constrain(node), state, is_leaf=is_named)


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def train_step(
    plan: Plan,
    state: State,
    scales: Parameters,
    frozen: Parameters,
    masks: Parameters,
    teacher: Parameters,
    ids: jax.Array,
    rate: jax.Array,
) -> tuple[State, Metrics]:
    """One step.

    Args:
        state: before the step. Consumed.
        scales: from `begin`.
        frozen: the parameters that are not trained.
        masks: kernel name -> bool [N, in, out].
        teacher: parameters of the dense model, {} for none.
        ids: int32 [A, B, L], A micro-batches whose gradients are averaged; one's activations are in memory at a time.
        rate: float32 scalar, the learning rate as a fraction of `scales`.

    Returns:
        The state after the step, or the state before it if loss or gradient are not finite; and the metrics of
        `Objective` and the norm of the gradient.
    """
    gradient, metrics = _mean_gradient(plan, state.values, frozen, masks, teacher, ids)
    own = of_values(masks, state.values)
    norm = optax.tree.norm(zero_pruned(own, gradient))
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

    def kept(after: Any, before: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)

    clipped = jax.tree.map(lambda value: value * jnp.minimum(1.0, plan.clip / norm), gradient)
    _, optimizer = plan.optimizer().update(clipped, state.optimizer, state.values, masks=own)
    # Where weights are computed from moments that are not computed again for it, XLA reads and writes each array once.
    optimizer = lax.optimization_barrier(kept(_shard_state(optimizer, plan.mesh), state.optimizer))
    updates = adam_direction(optimizer.inner)
    moved = {name: value - rate * scales[name] * updates[name] for name, value in state.values.items()}
    values = shard(zero_pruned(own, moved), plan.mesh)
    after = State(kept(values, state.values), optimizer, kept(state.step + 1, state.step))
    return after, {**metrics, "gradient_norm": norm}


def adam_direction(state: optax.ScaleByAdamState) -> Parameters:
    """What Adam subtracts, times the learning rate, from its state after an update."""
    first = optax.tree.bias_correction(state.mu, B1, state.count)
    second = optax.tree.bias_correction(state.nu, B2, state.count)
    return jax.tree.map(lambda mean, square: mean / (jnp.sqrt(square) + EPSILON), first, second)


def _mean_gradient(
    plan: Plan, values: Parameters, frozen: Parameters, masks: Parameters, teacher: Parameters, ids: jax.Array
) -> tuple[Parameters, Metrics]:
    """Gradient and metrics of `Objective.gradient`, means over the micro-batches of ids int32 [A, B, L]."""
    low_rank = masks if any(name.endswith(lora.FIRST) for name in values) else {}

    def of_micro_batch(piece: jax.Array) -> tuple[Parameters, Metrics]:
        gradient, metrics = plan.objective.gradient(values, frozen, low_rank, teacher, constrain(piece, ALL))
        return shard(gradient, plan.mesh), metrics

    if ids.shape[0] == 1:
        return of_micro_batch(ids[0])

    def add(total: tuple, piece: jax.Array) -> tuple[tuple, None]:
        gradient, metrics = jax.tree.map(jnp.add, total, of_micro_batch(piece))
        return (shard(gradient, plan.mesh), metrics), None

    zeros = {name: jnp.zeros((), jnp.float32) for name in ("loss", "kl", "cross_entropy")}
    start = (shard(jax.tree.map(jnp.zeros_like, values), plan.mesh), zeros)
    return jax.tree.map(lambda value: value / ids.shape[0], lax.scan(add, start, ids)[0])


@partial(jax.jit, static_argnames=("plan", "dtypes"))
def held_out_losses(
    plan: Plan,
    dtypes: tuple[tuple[str, str], ...],
    values: Parameters,
    frozen: Parameters,
    masks: Parameters,
    teacher: Parameters,
    ids: jax.Array,
) -> Metrics:
    """Mean loss over micro-batches int32 [A, B, L], of weights rounded to the dtypes in which they will be written.

    Args:
        dtypes: (name, dtype) of the trained parameters of the checkpoint.
    """
    rounding = dict(dtypes)
    written = {
        name: value.astype(rounding.get(name, frozen[name].dtype if name in frozen else value.dtype))
        for name, value in final_kernels(values, frozen, masks, plan.mesh).items()
    }
    parameters = {**frozen, **{name: value.astype(jnp.float32) for name, value in written.items()}}
    each = lax.map(lambda piece: plan.objective.losses(parameters, {}, teacher, constrain(piece, ALL)), ids)
    return jax.tree.map(lambda value: constrain(jnp.mean(value)), each)


@partial(jax.jit, static_argnames="mesh")
def final_kernels(values: Parameters, frozen: Parameters, masks: Parameters, mesh: tuple[int, int]) -> Parameters:
    """The trained parameters as they are written, float32, low-rank updates merged, pruned weights 0."""
    factors = {name: value for name, value in values.items() if name.endswith((lora.FIRST, lora.SECOND))}
    if not factors:
        return values
    kernels = {name: frozen[name] for name in masks}
    return shard(lora.merge({**kernels, **factors}, masks), mesh)
