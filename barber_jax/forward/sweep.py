"""Backward sweep: the gradient of the dense model's end loss at every block, with one block in memory at a time.

A forward pass keeps the residual stream at every k-th block boundary in host memory. Then, from the last block to the
first, the vector-Jacobian product of each block at its input is taken with the cotangent that comes from above; where k
is above 1, the streams between two boundaries are computed once more. Device memory does not grow with depth.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Phase
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.devices.host_memory import available_bytes
from barber_jax.devices.mesh import Devices, broadcast_from_primary
from barber_jax.forward import cotangents, passes
from barber_jax.forward.cotangents import Labels, Norm
from barber_jax.forward.dense import final_hidden, read_replicated
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream
from barber_jax.models.decoder import BlockDefinition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA

HOST_SHARE = 0.5
"""Fraction of the available host memory that the kept streams may take."""


@dataclass(frozen=True)
class Wanted:
    """What a sweep computes.

    Attributes:
        labels: of the loss: `data`, the next tokens, or `model`, drawn from the model's own distribution.
        norm: over samples, of each weight's gradient; None for no weight gradients.
        tokens: whether tokens' squared cotangents are wanted.
        seed: for `model` labels.
    """

    labels: Labels = "data"
    norm: Norm | None = None
    tokens: bool = False
    seed: int = 0


@dataclass
class BlockGradients:
    """What a sweep gives for a block.

    Attributes:
        weights: kernel path -> float32 [in, out], norm over samples of the gradient of a sample's mean loss: the mean
            of absolute gradients, or the root of the mean of squared ones; {} where not wanted.
        tokens: kernel path -> float32 [S, L], mean over the linear's outputs of the squared cotangent of its output at
            a token, the loss summed over positions; {} where not wanted.
        cotangent: [M, B, L, D], of the hidden states that enter the block; valid until the next block is asked for.
    """

    weights: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    cotangent: Stream


def boundary_interval(layers: int, stream_bytes: int, available: int | None) -> int:
    """The smallest k for which the streams that are kept at every k-th boundary, and those of the k blocks between two
    of them, fit into `available` bytes; where none does, the k that takes least.

    Args:
        stream_bytes: of one stream.
        available: None where it is not known.
    """
    kept = {k: math.ceil(layers / k) + k - 1 for k in range(1, layers + 1)}
    fitting = [k for k, streams in kept.items() if available is None or streams * stream_bytes <= available]
    return fitting[0] if fitting else min(kept, key=kept.get)


def sweep(
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray,
    devices: Devices,
    wanted: Wanted,
    *,
    offload: bool = False,
    every: int | None = None,
    phase: Phase | None = None,
) -> Iterator[tuple[int, BlockGradients]]:
    """Yield (index, gradients) of every block of a checkpoint, from the last to the first.

    Args:
        ids: int32 [M, B, L] token ids, M micro-batches of B samples.
        offload: keep activations and cotangents in host memory, with one micro-batch at a time on the device.
        every: k; default: chosen by `boundary_interval`. It does not change the result.
        phase: advanced after each block of the forward and of the backward pass, if given.

    Raises:
        BarberError: a tensor is damaged, or the gradients overflow.
    """
    blocks = model.blocks()
    boundaries: dict[int, Stream] = {}
    entered = itertools.count()

    def keep(block: BlockDefinition, parameters: Parameters, stream: Stream) -> None:
        nonlocal every
        interrupt.check()
        every = every or _interval(model.layers, stream)
        if (index := next(entered)) % every == 0:
            # Chunks in host memory are not donated, so that they need no copy.
            boundaries[index] = stream.part(slice(None)) if offload else Stream(stream, offload=True)

    hidden = final_hidden(checkpoint, model, ids, devices, offload, keep, phase)
    cotangent = _top(checkpoint, model, ids, devices, wanted, hidden)
    while boundaries:
        first, stream = boundaries.popitem()
        inputs = [stream]
        for index in range(first, min(first + every, model.layers) - 1):
            parameters = _read(checkpoint, model, index, devices)
            chunks = (passes.propagate(blocks[index], parameters, {}, chunk) for chunk in inputs[-1])
            inputs.append(Stream(chunks, offload=True).ready())
        while inputs:
            index = first + len(inputs) - 1
            parameters = _read(checkpoint, model, index, devices)
            found, cotangent = _backward(blocks[index], parameters, inputs.pop(), cotangent, devices, wanted, ids.shape)
            if not all(np.isfinite(value).all() for part in (found.weights, found.tokens) for value in part.values()):
                raise BarberError(
                    f"block {index}: the gradients of the dense model's loss are not finite; "
                    "the activations overflow, check the checkpoint's weights"
                )
            if phase:
                phase.advance()
            interrupt.check()
            yield index, found


def _interval(layers: int, stream: Stream) -> int:
    """k for a model of this many blocks, the same on every process."""
    own = stream.nbytes // jax.process_count()

    def choose() -> int:
        available = available_bytes()
        return boundary_interval(layers, own, available and int(HOST_SHARE * available))

    return broadcast_from_primary(choose)


def _read(checkpoint: Checkpoint, model: Model, index: int, devices: Devices) -> Parameters:
    """Parameters of a block, on the devices."""
    return devices.put_block(model.sub_blocks, read_parameters(checkpoint, model.names.of_block(index)))


def _top(
    checkpoint: Checkpoint, model: Model, ids: np.ndarray, devices: Devices, wanted: Wanted, hidden: Stream
) -> Stream:
    """Cotangent of the hidden states after the last block, which are consumed."""
    head, parameters = model.head(), read_replicated(checkpoint, model.names.head, devices)
    key, batch = devices.put(np.asarray(jax.random.key_data(jax.random.key(wanted.seed)))), ids.shape[1]

    def chunks() -> Iterator[jax.Array]:
        done = 0
        for chunk in hidden.take():
            own = devices.put(ids[done : done + len(chunk)], None, DATA)
            first = devices.put(np.asarray(done * batch, np.int32))
            done += len(chunk)
            yield cotangents.top(head, parameters, chunk, own, wanted.labels, key, first)

    return Stream(chunks(), hidden.offloaded).ready()


def _backward(
    block: BlockDefinition,
    parameters: Parameters,
    stream: Stream,
    cotangent: Stream,
    devices: Devices,
    wanted: Wanted,
    shape: tuple[int, int, int],
) -> tuple[BlockGradients, Stream]:
    """Take the cotangent back through a block; `cotangent` is consumed.

    Args:
        stream: hidden states that enter the block.
        shape: [M, B, L].
    """
    count, batch, length = shape
    totals = cotangents.zero_totals(block) if wanted.norm else {}
    squares: list[dict[str, np.ndarray]] = []

    def entering() -> Iterator[jax.Array]:
        nonlocal totals
        for chunk, leaving in zip(stream, cotangent.take(), strict=True):
            before, totals, of_tokens = cotangents.backward(
                block, parameters, chunk, leaving, totals, wanted.norm, wanted.tokens
            )
            if wanted.tokens:
                squares.append(devices.fetch(of_tokens))
            yield before

    below = Stream(entering(), cotangent.offloaded).ready()
    weights = {}
    if wanted.norm:
        labels = cotangents.label_count(wanted.labels, length)
        weights = devices.fetch(cotangents.mean_norm(block, totals, wanted.norm, count * batch, labels))
    paths = squares[0] if squares else {}
    tokens = {path: np.concatenate([part[path].reshape(-1, length) for part in squares]) for path in paths}
    return BlockGradients(weights, tokens, below), below
