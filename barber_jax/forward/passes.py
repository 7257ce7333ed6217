"""Activations through parts of a model: jitted once per shape, scanned over micro-batches.

A stream is the hidden state of every calibration sample, [M, B, L, D]: M micro-batches of B samples. At any time one
micro-batch's intermediate activations exist, so peak memory follows B and not the number of samples. Parameters are
flat dicts of Flax paths (see models.decoder); kernels [in, out], masks [out, in].
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from barber_jax.models.decoder import BlockDefinition, Definition
from barber_jax.models.sharding import DATA, constrain

Parameters = dict[str, jax.Array]


def default_batch(length: int) -> int:
    """Samples of a micro-batch where the user says nothing: on CPU about 1024 tokens, which stay in its caches."""
    return min(8, max(1, 1024 // length)) if jax.default_backend() == "cpu" else 8


def micro_batches(ids: np.ndarray, batch: int, multiple: int = 1, held_out: int = 0) -> np.ndarray:
    """[S, L] -> [M, B, L] with B the largest divisor of S that is at most `batch` and a multiple of `multiple`, which
    divides S; the last `held_out` samples fill micro-batches of their own."""
    sizes = range(multiple, max(multiple, min(batch, len(ids))) + 1, multiple)
    size = max(b for b in sizes if len(ids) % b == 0 and held_out % b == 0)
    return ids.reshape(-1, size, ids.shape[1])


def sparsify(parameters: Parameters, masks: dict[str, jax.Array]) -> Parameters:
    """Zero the pruned weights; a kernel without a mask stays dense."""
    zeroed = {path: jnp.where(mask.T, parameters[path], 0) for path, mask in masks.items()}
    return {**parameters, **zeroed}


@partial(jax.jit, static_argnames="definition")
def embed(definition: Definition, parameters: Parameters, ids: jax.Array) -> jax.Array:
    """int32 [M, B, L] token ids -> stream [M, B, L, D]."""
    return constrain(lax.map(definition.bind(parameters), ids), None, DATA)


@partial(jax.jit, static_argnames="definition", donate_argnames="stream")
def propagate(
    definition: BlockDefinition, parameters: Parameters, masks: dict[str, jax.Array], stream: jax.Array
) -> jax.Array:
    """The stream after the block under these masks ({}: dense). Consumes `stream`."""
    sparse = sparsify(parameters, masks)
    return constrain(lax.map(lambda hidden: definition.run(sparse, constrain(hidden, DATA)), stream), None, DATA)


@partial(jax.jit, static_argnames=("definition", "statistic"))
def statistics(
    definition: BlockDefinition,
    statistic: Callable[[jax.Array], jax.Array],
    parameters: Parameters,
    stream: jax.Array,
) -> dict[str, jax.Array]:
    """What a criterion wants to know of every linear's input, from a forward of the dense block.

    Returns:
        input name (second of `SubBlock.linears`) -> `statistic` summed over the stream.
    """

    def measure(hidden: jax.Array) -> dict[str, jax.Array]:
        seen = {}
        tap = lambda name, value: seen.__setitem__(name, constrain(statistic(value)))  # noqa: E731
        definition.run(parameters, constrain(hidden, DATA), tap)
        return seen

    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(measure, stream[0]))
    total, _ = lax.scan(lambda total, hidden: (jax.tree.map(jnp.add, total, measure(hidden)), None), zeros, stream)
    return total


@partial(jax.jit, static_argnames="definition")
def head(definition: Definition, parameters: Parameters, hidden: jax.Array) -> jax.Array:
    """float32 logits [B, L, vocabulary] of one micro-batch [B, L, D] of final hidden states."""
    return definition.bind(parameters)(hidden).astype(jnp.float32)
