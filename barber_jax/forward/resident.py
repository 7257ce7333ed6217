"""A whole model on the devices, for evaluations that come back to it again and again.

The blocks' parameters are stacked, [blocks, ...], and scanned over, so that one block is compiled whatever the depth.
Over a mesh, sequences are spread over `data` and the blocks' linears over `model`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.devices.mesh import Devices
from barber_jax.forward.passes import Parameters
from barber_jax.models.decoder import BlockDefinition, Definition, Memory
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, constrain, parameter_axes

# The head looks at this many places at a time, so that logits over a large vocabulary stay small.
HEAD_PLACES = 256

Keys = tuple[jax.Array, jax.Array]
"""Keys and values of every block, [blocks, B, T, K, E] each."""


def stacked_blocks(checkpoint: Checkpoint, model: Model, devices: Devices) -> Parameters:
    """Every block's parameters: path -> [blocks, ...]."""
    axes = parameter_axes(model.sub_blocks)
    stacked = {}
    for path in model.names.block:
        # One path at a time: the host never holds the model as well.
        parts = [
            read_parameters(checkpoint, {path: model.names.of_block(index)[path]})[path]
            for index in range(model.layers)
        ]
        stacked[path] = devices.put(np.stack(parts), None, *axes.get(path, ()))
    return stacked


@partial(jax.jit, static_argnames=("embed", "block"))
def _states(
    embed: Definition, block: BlockDefinition, first: Parameters, blocks: Parameters, ids: jax.Array
) -> jax.Array:
    """int32 [B, L] -> [B, L, D] final hidden states."""

    def step(hidden: jax.Array, layer: Parameters) -> tuple[jax.Array, None]:
        return constrain(block.run(layer, hidden), DATA), None

    return lax.scan(step, constrain(embed.bind(first)(ids), DATA), blocks)[0]


@partial(jax.jit, static_argnames="head")
def _judge(
    head: Definition, last: Parameters, hidden: jax.Array, rows: jax.Array, places: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token, and whether it is the likeliest.

    Args:
        hidden: [B, L, D]. rows, places, targets: int32 [N], N a multiple of HEAD_PLACES or less than it.

    Returns:
        float32 [N], bool [N].
    """
    module = head.bind(last)

    def part(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = module(piece[0][None])[0].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, piece[1][:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == piece[1]

    step = min(HEAD_PLACES, len(rows))
    states = hidden[rows, places].reshape(-1, step, hidden.shape[-1])
    log, likeliest = lax.map(part, (states, targets.reshape(-1, step)))
    return constrain(log.reshape(-1)), constrain(likeliest.reshape(-1))


@partial(jax.jit, static_argnames=("embed", "block", "head", "room"))
def _read(
    embed: Definition,
    block: BlockDefinition,
    head: Definition,
    parameters: tuple[Parameters, Parameters, Parameters],
    ids: jax.Array,
    lengths: jax.Array,
    room: int,
) -> tuple[jax.Array, Keys]:
    """Read prompts: int32 [B, L] ids of which row b has lengths[b] -> likeliest next token [B], and the keys and
    values with room for `room` positions."""
    first, blocks, last = parameters

    def step(hidden: jax.Array, layer: Parameters) -> tuple[jax.Array, Keys]:
        memory = Memory()
        hidden = block.run(layer, hidden, memory=memory)
        grow = ((0, 0), (0, room - ids.shape[1]), (0, 0), (0, 0))
        return constrain(hidden, DATA), (jnp.pad(memory.keys, grow), jnp.pad(memory.values, grow))

    hidden, keys = lax.scan(step, constrain(embed.bind(first)(ids), DATA), blocks)
    final = hidden[jnp.arange(len(ids)), lengths - 1]
    return constrain(jnp.argmax(head.bind(last)(final[:, None])[:, 0], axis=-1)), keys


@partial(jax.jit, static_argnames=("embed", "block", "head", "steps"), donate_argnames="keys")
def _continue(
    embed: Definition,
    block: BlockDefinition,
    head: Definition,
    parameters: tuple[Parameters, Parameters, Parameters],
    token: jax.Array,
    position: jax.Array,
    keys: Keys,
    steps: int,
) -> tuple[jax.Array, jax.Array, Keys]:
    """Put `token` [B] at `position` [B], and so on for `steps` tokens -> int32 [B, steps] the tokens put, the one to
    put next, keys. Consumes `keys`."""
    first, blocks, last = parameters
    embedding, output = embed.bind(first), head.bind(last)

    def put(carry: tuple[jax.Array, jax.Array, Keys], _: None) -> tuple[Any, jax.Array]:
        token, position, keys = carry

        def step(hidden: jax.Array, layer: tuple[Parameters, Keys]) -> tuple[jax.Array, Keys]:
            memory = Memory(position, *layer[1])
            hidden = block.run(layer[0], hidden, memory=memory)
            return hidden, (memory.keys, memory.values)

        hidden, keys = lax.scan(step, embedding(token[:, None], position), (blocks, keys))
        following = jnp.argmax(output(hidden)[:, 0], axis=-1).astype(token.dtype)
        return (following, position + 1, keys), token

    (token, _, keys), tokens = lax.scan(put, (token, position, keys), None, length=steps)
    return constrain(tokens.T), constrain(token), keys


class ResidentModel:
    """A model whose parameters stay on the devices.

    Args:
        checkpoint, model: what to load; tensors already checked.
        devices: where to.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model, devices: Devices):
        def put(names: dict[str, str]) -> Parameters:
            return {path: devices.put(value) for path, value in read_parameters(checkpoint, names).items()}

        self._devices = devices
        self._definitions = (model.embed(), model.block(), model.head())
        self._parameters = (put(model.names.embed), stacked_blocks(checkpoint, model, devices), put(model.names.head))

    def judge(
        self, ids: np.ndarray, rows: np.ndarray, places: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How likely given tokens are after given places of a batch of sequences.

        Args:
            ids: int32 [B, L]; B a multiple of the mesh's `data`.
            rows, places, targets: int32 [N]: token targets[n] after places[n] of sequence rows[n].

        Returns:
            natural log-probabilities float32 [N], and whether the token is the likeliest, bool [N].
        """
        embed, block, head = self._definitions
        first, blocks, last = self._parameters
        count = len(rows)
        # To a power of two, or whole steps of the head: a handful of shapes.
        size = 1 << max(4, (count - 1).bit_length()) if count < HEAD_PLACES else -(-count // HEAD_PLACES) * HEAD_PLACES
        padded = [np.pad(np.asarray(values, np.int32), (0, size - count)) for values in (rows, places, targets)]
        with self._devices.context():
            hidden = _states(embed, block, first, blocks, self._devices.put(ids, DATA))
            log, likeliest = _judge(head, last, hidden, *map(self._devices.put, padded))
        return np.asarray(log)[:count], np.asarray(likeliest)[:count]

    def generate(
        self, ids: np.ndarray, lengths: np.ndarray, tokens: int, steps: int, stop: Callable[[np.ndarray], bool]
    ) -> np.ndarray:
        """Continue prompts greedily.

        Args:
            ids: int32 [B, L] prompts, padded on the right; lengths: int32 [B], their own lengths.
            tokens: the most tokens to add; a multiple of `steps`.
            steps: tokens between two calls of `stop`.
            stop: called with what was added so far, int32 [B, n]; true ends it.

        Returns:
            int32 [B, n] added tokens, n a multiple of `steps`.
        """
        put, made = self._devices.put, []
        with self._devices.context():
            room = ids.shape[1] + tokens
            token, keys = _read(*self._definitions, self._parameters, put(ids, DATA), put(lengths, DATA), room)
            for begin in range(0, tokens, steps):
                position = put(np.asarray(lengths + begin, np.int32), DATA)
                more, token, keys = _continue(*self._definitions, self._parameters, token, position, keys, steps)
                made.append(np.asarray(more))
                if stop(np.concatenate(made, axis=1)):
                    break
        return np.concatenate(made, axis=1)
