"""Jitted passes through the embeddings, a decoder block and the head, scanned over micro-batches.

A stream holds the hidden states of all calibration samples, [M, B, L, D]: M micro-batches of B samples. Only one
micro-batch's intermediate activations exist at a time, so peak memory depends on B and not on the number of samples.
Parameters are flat dicts of Flax paths (see models.decoder); kernels are [in, out], masks [out, in].
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from barber_jax.console.errors import BarberError
from barber_jax.models.decoder import BlockDefinition, Definition
from barber_jax.models.sharding import DATA, constrain

Parameters = dict[str, jax.Array]

HEAD_TOKENS = 256
"""Tokens for which logits are computed at a time, at most: of all of them they would take much memory."""
HEAD_LOGITS = 1 << 25
"""Logits that are computed at a time, at most: 128 MB in float32; softmax takes as much again, more than once."""


def default_batch(length: int) -> int:
    """Default number of samples in a micro-batch: 8, or on CPU about 1024 tokens so that they stay in its caches."""
    return min(8, max(1, 1024 // length)) if jax.default_backend() == "cpu" else 8


def head_tokens(definition: Definition) -> int:
    """Tokens for which a head computes logits at a time: HEAD_TOKENS, or a smaller power of two for HEAD_LOGITS."""
    vocabulary = dict(definition.shapes)["lm_head.kernel"][1]
    return min(HEAD_TOKENS, 1 << max(0, (HEAD_LOGITS // vocabulary).bit_length() - 1))


def head_positions(definition: Definition, batch: int, length: int) -> int:
    """Positions of a micro-batch for which a head computes logits at a time.

    Args:
        definition: of the head.
        batch, length: number of sequences, and of each one's tokens.
    """
    return max(1, min(head_tokens(definition) // batch, length))


def micro_batches(ids: np.ndarray, batch: int, multiple: int = 1, held_out: int = 0) -> np.ndarray:
    """Split samples [S, L] into micro-batches [M, B, L].

    B is the largest number up to `batch` that divides S and `held_out` and is a multiple of `multiple`; if there is
    none, `multiple` itself, which must divide both. So no micro-batch mixes the last `held_out` samples with others.
    """
    sizes = range(multiple, max(multiple, min(batch, len(ids))) + 1, multiple)
    size = max(b for b in sizes if len(ids) % b == 0 and held_out % b == 0)
    return ids.reshape(-1, size, ids.shape[1])


def sparsify(parameters: Parameters, masks: dict[str, jax.Array]) -> Parameters:
    """Return the parameters with pruned weights set to zero; a kernel without a mask stays dense."""
    zeroed = {path: jnp.where(mask.T, parameters[path], 0) for path, mask in masks.items()}
    return {**parameters, **zeroed}


@partial(jax.jit, static_argnames="definition")
def embed(definition: Definition, parameters: Parameters, ids: jax.Array) -> jax.Array:
    """Embed token ids: int32 [M, B, L] -> stream [M, B, L, D]."""
    return constrain(lax.map(definition.bind(parameters), ids), None, DATA)


@partial(jax.jit, static_argnames="definition", donate_argnames="stream")
def propagate(
    definition: BlockDefinition, parameters: Parameters, masks: dict[str, jax.Array], stream: jax.Array
) -> jax.Array:
    """Propagate a stream [M, B, L, D] through a block under its masks ({} for a dense block). Donates `stream`."""
    sparse = sparsify(parameters, masks)
    return constrain(lax.map(lambda hidden: definition.run(sparse, constrain(hidden, DATA)), stream), None, DATA)


@partial(jax.jit, static_argnames=("definition", "statistic"))
def statistics(
    definition: BlockDefinition,
    statistic: Callable[[jax.Array], jax.Array],
    parameters: Parameters,
    stream: jax.Array,
) -> dict[str, jax.Array]:
    """Compute a criterion's statistic of every linear's input in a forward pass of the dense block.

    Args:
        statistic: activations [B, L, I] -> float32 array; see `Criterion.statistic`.
        stream: [M, B, L, D].

    Returns:
        Input name (second of `SubBlock.linears`) -> statistic summed over the micro-batches.
    """

    def measure(hidden: jax.Array) -> dict[str, jax.Array]:
        measured = {}

        def tap(name: str, value: jax.Array) -> None:
            measured[name] = constrain(statistic(value))

        definition.run(parameters, constrain(hidden, DATA), tap)
        return measured

    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(measure, stream[0]))
    total, _ = lax.scan(lambda total, hidden: (jax.tree.map(jnp.add, total, measure(hidden)), None), zeros, stream)
    return total


@partial(jax.jit, static_argnames="definition")
def head(definition: Definition, parameters: Parameters, hidden: jax.Array) -> jax.Array:
    """Logits of one micro-batch: final hidden states [B, L, D] -> float32 [B, L, vocabulary]."""
    return definition.bind(parameters)(hidden).astype(jnp.float32)


def not_finite() -> BarberError:
    """The error for a model whose logits are NaN or Inf: tokens and figures made of them would look like any others."""
    return BarberError(
        "the model's logits are NaN or Inf: its activations do not fit the dtype in which it computes; "
        "use float32 or bfloat16"
    )
