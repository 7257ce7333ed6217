"""Forward pass through a whole checkpoint with one decoder block in memory at a time."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from barber_jax.console.progress import Phase
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.streams import Stream
from barber_jax.models.decoder import BlockDefinition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA

TOKENS = "embed_tokens.embedding"
"""Path of the token embedding in every family's embedding, [vocabulary, E]."""


def read_replicated(checkpoint: Checkpoint, names: dict[str, str], devices: Devices) -> passes.Parameters:
    """Read parameters from a checkpoint and replicate them on every device.

    Args:
        names: parameter path -> tensor name in the checkpoint.
    """
    return {path: devices.put(value) for path, value in read_parameters(checkpoint, names).items()}


def read_embedding(
    checkpoint: Checkpoint, model: Model, ids: np.ndarray, devices: Devices
) -> tuple[passes.Parameters, np.ndarray]:
    """Read the parameters of the embedding from a checkpoint, of its tokens only those that occur in `ids`.

    With a large vocabulary the whole table may be larger than all blocks.

    Args:
        ids: int32 token ids of any shape.

    Returns:
        The parameters on the devices, and the ids by which they have the tokens, of the shape of `ids`.
    """
    read = read_parameters(checkpoint, model.names.embed)
    tokens, own_ids = np.unique(ids, return_inverse=True)
    read[TOKENS] = read[TOKENS][tokens]
    return {path: devices.put(value) for path, value in read.items()}, own_ids.reshape(ids.shape).astype(np.int32)


def embedded(
    model: Model, parameters: passes.Parameters, ids: np.ndarray, boundaries: Sequence[int], devices: Devices
) -> Iterator[jax.Array]:
    """Embed token ids, chunk by chunk.

    Args:
        parameters, ids: from `read_embedding`, ids [M, B, L] of M micro-batches of B sequences.
        boundaries: micro-batches before which a new chunk begins.

    Yields:
        Hidden states [m, B, L, D] of each chunk.
    """
    for chunk in np.split(ids, boundaries):
        yield passes.embed(model.embed(), parameters, devices.put(chunk, None, DATA))


def final_hidden(
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray,
    devices: Devices,
    offload: bool = False,
    visit: Callable[[BlockDefinition, passes.Parameters, Stream], None] = lambda block, parameters, stream: None,
    phase: Phase | None = None,
) -> Stream:
    """Run all blocks of a checkpoint and return the hidden states after the last one.

    Args:
        ids: int32 [M, B, L] token ids, M micro-batches of B sequences.
        offload: keep activations in host memory, with one micro-batch at a time on the device.
        visit: called before each block with the block, its parameters and its input stream.
        phase: advanced after each block, if given.

    Returns:
        Stream [M, B, L, D], before the final norm.
    """
    # With offloading, embed one micro-batch at a time: all of them might not fit on the device.
    boundaries = range(1, len(ids)) if offload else ()
    embedding = read_embedding(checkpoint, model, ids, devices)
    stream, blocks = Stream(embedded(model, *embedding, boundaries, devices), offload), model.blocks()
    for index in range(model.layers):
        # Read from disk while the devices still compute the previous block, but copy only after that: the devices
        # hold one block at a time.
        read = read_parameters(checkpoint, model.names.of_block(index))
        stream.ready()
        if phase and index:
            phase.advance()
        parameters = devices.put_block(model.sub_blocks, read)
        block = blocks[index]
        visit(block, parameters, stream)
        propagated = (passes.propagate(block, parameters, {}, chunk) for chunk in stream.take())
        stream = Stream(propagated, offload)
    stream.ready()
    if phase:
        phase.advance()
    return stream


def logits(checkpoint: Checkpoint, model: Model, ids: np.ndarray) -> Iterator[jax.Array]:
    """Yield the logits of each micro-batch, float32 [B, L, vocabulary], for token ids int32 [M, B, L]."""
    devices = Devices()
    parameters = read_replicated(checkpoint, model.names.head, devices)
    for chunk in final_hidden(checkpoint, model, ids, devices).take():
        for batch in chunk:
            yield passes.head(model.head(), parameters, batch)
