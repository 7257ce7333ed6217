"""Dense forward of a whole checkpoint, one block in memory at a time."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from barber_jax.console.progress import Phase
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.streams import Stream
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA


def on_devices(checkpoint: Checkpoint, names: dict[str, str], devices: Devices) -> passes.Parameters:
    """A part's parameters, the same on every device."""
    return {path: devices.put(value) for path, value in read_parameters(checkpoint, names).items()}


def final_hidden(
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray,
    devices: Devices,
    offload: bool = False,
    visit: Callable[[passes.Parameters, Stream], None] = lambda parameters, stream: None,
    phase: Phase | None = None,
) -> Stream:
    """Hidden state after the last block.

    Args:
        ids: int32 [M, B, L] token ids, M micro-batches of B sequences.
        offload: keep activations in host memory, but for a micro-batch.
        visit: called with every block's parameters and the stream that enters it, in turn.
        phase: told of every block that is done, if given.

    Returns:
        stream of [M, B, L, D].
    """
    embedding = on_devices(checkpoint, model.names.embed, devices)
    # Offloaded micro-batches are embedded one by one: all at once would have to fit on the device.
    chunks = np.split(ids, len(ids)) if offload else [ids]
    embedded = (passes.embed(model.embed(), embedding, devices.put(chunk, None, DATA)) for chunk in chunks)
    stream, block = Stream(embedded, offload), model.block()
    for index in range(model.layers):
        # Read from disk while the block before is still computed; the devices hold one block at a time.
        read = read_parameters(checkpoint, model.names.of_block(index))
        stream.ready()
        if phase and index:
            phase.advance()
        parameters = devices.block(model.sub_blocks, read)
        visit(parameters, stream)
        moved = (passes.propagate(block, parameters, {}, chunk) for chunk in stream.take())
        stream = Stream(moved, offload)
    stream.ready()
    if phase:
        phase.advance()
    return stream


def logits(checkpoint: Checkpoint, model: Model, ids: np.ndarray) -> Iterator[jax.Array]:
    """float32 [B, L, vocabulary] logits of each micro-batch of ids, int32 [M, B, L], in turn."""
    devices = Devices()
    parameters = on_devices(checkpoint, model.names.head, devices)
    for chunk in final_hidden(checkpoint, model, ids, devices).take():
        for batch in chunk:
            yield passes.head(model.head(), parameters, batch)
