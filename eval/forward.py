"""A dense forward of a whole checkpoint, one block in memory at a time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax import passes
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.models.family import Model


def on_device(parameters: dict[str, np.ndarray]) -> passes.Parameters:
    """Move a part's parameters to the device."""
    return {path: jnp.asarray(value) for path, value in parameters.items()}


def final_hidden(checkpoint: Checkpoint, model: Model, ids: np.ndarray) -> jax.Array:
    """Hidden state after the last block.

    Args:
        ids: int32 [M, B, L] token ids, M micro-batches of B sequences.

    Returns:
        [M, B, L, D].
    """
    hidden = passes.embed(model.embed(), on_device(read_parameters(checkpoint, model.names.embed)), ids)
    block = model.block()
    for index in range(model.layers):
        parameters = on_device(read_parameters(checkpoint, model.names.of_block(index)))
        hidden = passes.propagate(block, parameters, {}, hidden)
    return hidden


def logits(checkpoint: Checkpoint, model: Model, ids: np.ndarray) -> Iterator[jax.Array]:
    """float32 [B, L, vocabulary] logits of each micro-batch of ids, int32 [M, B, L], in turn."""
    hidden = final_hidden(checkpoint, model, ids)
    parameters = on_device(read_parameters(checkpoint, model.names.head))
    for batch in hidden:
        yield passes.head(model.head(), parameters, batch)
