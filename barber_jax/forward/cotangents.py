"""Jitted parts of the backward sweep: the gradient of the loss at the last hidden states, and a block's backward pass.

The loss of a sample is the sum over its positions of the cross-entropy against labels: the next tokens of the text, or
tokens drawn from the model's own distribution, with which the second moment of the gradient is the Fisher matrix.
A cotangent is the gradient of the losses with respect to an activation; samples do not mix.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.forward.passes import Parameters, head_positions
from barber_jax.models.decoder import Block, BlockDefinition, Definition
from barber_jax.models.sharding import DATA, constrain, data_axis_size, kernel_axes

Labels = Literal["data", "model"]
Norm = Literal["l1", "l2"]


def label_count(labels: Labels, length: int) -> int:
    """Positions of a sample of `length` tokens that have a label: the last one has no next token in the text."""
    return length - 1 if labels == "data" else length


@partial(jax.jit, static_argnames=("definition", "labels"))
def top(
    definition: Definition,
    parameters: Parameters,
    hidden: jax.Array,
    ids: jax.Array,
    labels: Labels,
    key: jax.Array,
    first: jax.Array,
) -> jax.Array:
    """Cotangent of the hidden states after the last block; logits of a chunk of tokens are in memory at a time.

    Args:
        definition, parameters: of the head.
        hidden: [M, B, L, D].
        ids: int32 [M, B, L].
        key: raw random key, uint32 [2], from which `model` labels are drawn: the same ones however samples are put
            together.
        first: int32, index of the first sample among all.

    Returns:
        [M, B, L, D] in the dtype of `hidden`.
    """
    head = definition.bind(parameters)
    count, batch, length = ids.shape
    step = head_positions(definition, batch, length)
    padding = -length % step
    following = jnp.pad(ids[:, :, 1:], ((0, 0), (0, 0), (0, 1 + padding)))
    positions = jnp.arange(length + padding)
    samples = first + jnp.arange(count * batch).reshape(count, batch)

    def draw(sample: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, sample), position), logits)

    def part(samples: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """Of a step: states [B, step, D], following [B, step], positions [step]."""
        states, targets, positions = piece
        logits, pull = jax.vjp(lambda states: head(states), constrain(states, DATA))
        exact = logits.astype(jnp.float32)
        if labels == "model":
            targets = jax.vmap(jax.vmap(draw, (None, 0, 0)), (0, None, 0))(samples, positions, exact)
        # Not by an index: a scatter is slow where it must be repeatable.
        chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
        labelled = (positions < label_count(labels, length))[:, None]
        gradient = jnp.where(labelled, jax.nn.softmax(exact) - chosen, 0.0)
        return pull(gradient.astype(logits.dtype))[0]

    def micro_batch(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        states, targets, samples = group
        states = jnp.pad(states, ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, step, states.shape[-1])
        pieces = (jnp.moveaxis(states, 1, 0), jnp.moveaxis(targets.reshape(batch, -1, step), 1, 0))
        parts = lax.map(partial(part, samples), (*pieces, positions.reshape(-1, step)))
        whole = jnp.moveaxis(parts, 0, 1).reshape(batch, length + padding, -1)
        return constrain(whole[:, :length], DATA)

    return constrain(lax.map(micro_batch, (hidden, following, samples)), None, DATA)


def _constrain(definition: BlockDefinition, totals: Parameters) -> Parameters:
    axes = {path: kernel_axes(sub, path) for sub in definition.sub_blocks for path in sub.kernels}
    return {path: constrain(total, DATA, *axes[path]) for path, total in totals.items()}


@partial(jax.jit, static_argnames="definition")
def zero_totals(definition: BlockDefinition) -> Parameters:
    """Totals of `backward` before the first sample: kernel path -> float32 [N, in, out], for N samples side by side."""
    shapes, kernels = dict(definition.shapes), [path for sub in definition.sub_blocks for path in sub.kernels]
    return _constrain(definition, {path: jnp.zeros((data_axis_size(), *shapes[path])) for path in kernels})


def _add_to_output(block: Block, linear: str, added: jax.Array) -> None:
    """From now on, add an array to what a linear of a block gives: its gradient is the output's cotangent."""
    *parents, name = linear.split(".")
    module = block
    for parent in parents:
        module = getattr(module, parent)
    apply: Callable[[jax.Array], jax.Array] = getattr(module, name)
    setattr(module, name, lambda x: apply(x) + added)


@partial(jax.jit, static_argnames=("definition", "norm", "tokens"), donate_argnames=("cotangent", "totals"))
def backward(
    definition: BlockDefinition,
    parameters: Parameters,
    stream: jax.Array,
    cotangent: jax.Array,
    totals: Parameters,
    norm: Norm | None,
    tokens: bool,
) -> tuple[jax.Array, Parameters, Parameters]:
    """Take the cotangent back through a dense block, and add the norms of each sample's weight gradients.

    The gradient of a kernel for a sample is X^T C, with X the input of its linear and C the cotangent of its output,
    [L, in] and [L, out].

    Args:
        stream, cotangent: [M, B, L, D] hidden states that enter the block, and cotangent of those that leave it.
            The cotangent is consumed.
        totals: of the samples before, from `zero_totals`; {} without `norm`. Consumed.
        norm: over samples: l1 sums absolute gradients, l2 squared ones.
        tokens: whether to return the tokens' squared cotangents.

    Returns:
        cotangent: [M, B, L, D], of the hidden states that enter the block.
        totals: kernel path -> float32 [N, in, out], with these samples added.
        squares: kernel path -> float32 [M, B, L], mean over a linear's outputs of its squared cotangent; {} if not
            wanted.
    """
    linears = [pair for sub in definition.sub_blocks for pair in sub.linears] if norm or tokens else []
    shapes = dict(definition.shapes)

    def run(hidden: jax.Array, added: Parameters) -> tuple[jax.Array, Parameters]:
        block, inputs = definition.bind(parameters), {}
        for linear, zeros in added.items():
            _add_to_output(block, linear, zeros)
        return block.run(definition.sub_blocks, hidden, inputs.__setitem__), inputs

    def sum_up(total: jax.Array, x: jax.Array, of_output: jax.Array) -> jax.Array:
        """Add a micro-batch's samples, x [B, L, in] and of_output [B, L, out], to a kernel's total."""

        def side_by_side(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            gradient = jnp.einsum("nli,nlo->nio", *pair, preferred_element_type=jnp.float32)
            return total + (jnp.abs(gradient) if norm == "l1" else jnp.square(gradient)), None

        # Each group takes consecutive samples: those that its devices hold already.
        grouped = [value.reshape(len(total), -1, *value.shape[1:]) for value in (x, of_output)]
        return lax.scan(side_by_side, total, tuple(jnp.moveaxis(value, 1, 0) for value in grouped))[0]

    def micro_batch(totals: Parameters, pair: tuple[jax.Array, jax.Array]) -> tuple[Parameters, tuple]:
        hidden, leaving = (constrain(each, DATA) for each in pair)
        sizes = {linear: (*hidden.shape[:2], shapes[f"{linear}.kernel"][1]) for linear, _ in linears}
        added = {linear: jnp.zeros(size, hidden.dtype) for linear, size in sizes.items()}
        _, pull, inputs = jax.vjp(run, hidden, added, has_aux=True)
        entering, of_outputs = pull(leaving)
        if norm:
            totals = {
                path: sum_up(totals[path], inputs[entered], of_outputs[linear])
                for linear, entered in linears
                for path in [f"{linear}.kernel"]
            }
        squares = {
            f"{linear}.kernel": constrain(jnp.mean(jnp.square(of_outputs[linear].astype(jnp.float32)), -1), DATA)
            for linear, _ in linears
            if tokens
        }
        return _constrain(definition, totals), (constrain(entering, DATA), squares)

    totals, (cotangent, squares) = lax.scan(micro_batch, totals, (stream, cotangent))
    return constrain(cotangent, None, DATA), totals, {path: constrain(s, None, DATA) for path, s in squares.items()}


@partial(jax.jit, static_argnames=("definition", "norm"), donate_argnames="totals")
def mean_norm(definition: BlockDefinition, totals: Parameters, norm: Norm, samples: int, labels: int) -> Parameters:
    """Mean over samples of absolute gradients (l1), or root of the mean of squared ones (l2). Consumes `totals`.

    Args:
        samples: number of samples in the totals.
        labels: positions of a sample that have a label; the gradients become those of the mean over them.

    Returns:
        kernel path -> float32 [in, out].
    """
    axes = {path: kernel_axes(sub, path) for sub in definition.sub_blocks for path in sub.kernels}

    def mean(path: str, total: jax.Array) -> jax.Array:
        mean = jnp.sum(total, axis=0) / samples
        return constrain((mean if norm == "l1" else jnp.sqrt(mean)) / labels, *axes[path])

    return {path: mean(path, total) for path, total in totals.items()}
