"""A whole model in device memory: log-likelihoods of tokens and greedy generation, for zero-shot evaluation.

The blocks' parameters are stacked, [blocks, ...], and scanned over, so that only one block is compiled at any depth.
On a mesh, sequences are sharded over `data` and the blocks' linears over `model`.
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
from barber_jax.models.attention import BlockKVCache
from barber_jax.models.decoder import BlockDefinition, Definition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, constrain, parameter_axes

HEAD_POSITIONS = 256
"""Positions for which logits are computed at a time: over a large vocabulary all of them would take much memory."""

KVCache = tuple[jax.Array, jax.Array]
"""Keys and values of all blocks, [blocks, B, T, K, E] each."""


def stacked_blocks(checkpoint: Checkpoint, model: Model, devices: Devices) -> Parameters:
    """Read the parameters of all blocks and stack them on the devices: path -> [blocks, ...]."""
    axes = parameter_axes(model.sub_blocks)
    stacked = {}
    for path in model.names.block:
        # One path at a time, so that host memory never holds the whole model.
        parts = [
            read_parameters(checkpoint, {path: model.names.of_block(index)[path]})[path]
            for index in range(model.layers)
        ]
        stacked[path] = devices.put(np.stack(parts), None, *axes.get(path, ()))
    return stacked


@partial(jax.jit, static_argnames=("embed", "block"))
def _hidden_states(
    embed: Definition, block: BlockDefinition, embed_parameters: Parameters, blocks: Parameters, ids: jax.Array
) -> jax.Array:
    """Hidden states after the last block, [B, L, D], of token ids int32 [B, L]."""

    def step(hidden: jax.Array, layer: Parameters) -> tuple[jax.Array, None]:
        return constrain(block.run(layer, hidden), DATA), None

    return lax.scan(step, constrain(embed.bind(embed_parameters)(ids), DATA), blocks)[0]


@partial(jax.jit, static_argnames="head")
def _log_likelihoods(
    head: Definition,
    head_parameters: Parameters,
    hidden: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token after the given position, and whether it is the most likely token.

    Args:
        hidden: [B, L, D] hidden states after the last block.
        rows, positions, targets: int32 [N]; N is a multiple of HEAD_POSITIONS, or below it.

    Returns:
        float32 [N] and bool [N].
    """
    module = head.bind(head_parameters)

    def part(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = module(piece[0][None])[0].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, piece[1][:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == piece[1]

    step = min(HEAD_POSITIONS, len(rows))
    states = hidden[rows, positions].reshape(-1, step, hidden.shape[-1])
    log_probabilities, greedy = lax.map(part, (states, targets.reshape(-1, step)))
    return constrain(log_probabilities.reshape(-1)), constrain(greedy.reshape(-1))


@partial(jax.jit, static_argnames=("embed", "block", "head", "capacity"))
def _prefill(
    embed: Definition,
    block: BlockDefinition,
    head: Definition,
    parameters: tuple[Parameters, Parameters, Parameters],
    ids: jax.Array,
    lengths: jax.Array,
    capacity: int,
) -> tuple[jax.Array, KVCache]:
    """Process prompts and fill the key-value cache.

    Args:
        parameters: of the embeddings, the blocks and the head.
        ids: int32 [B, L] prompts, padded on the right.
        lengths: int32 [B], lengths of the prompts without padding.
        capacity: positions that the cache has room for.

    Returns:
        The most likely next token of each prompt, [B], and the cache.
    """
    embed_parameters, blocks, head_parameters = parameters

    def step(hidden: jax.Array, layer: Parameters) -> tuple[jax.Array, KVCache]:
        cache = BlockKVCache()
        hidden = block.run(layer, hidden, cache=cache)
        padding = ((0, 0), (0, capacity - ids.shape[1]), (0, 0), (0, 0))
        return constrain(hidden, DATA), (jnp.pad(cache.keys, padding), jnp.pad(cache.values, padding))

    hidden, cache = lax.scan(step, constrain(embed.bind(embed_parameters)(ids), DATA), blocks)
    final = hidden[jnp.arange(len(ids)), lengths - 1]
    return constrain(jnp.argmax(head.bind(head_parameters)(final[:, None])[:, 0], axis=-1)), cache


@partial(jax.jit, static_argnames=("embed", "block", "head", "steps"), donate_argnames="cache")
def _decode(
    embed: Definition,
    block: BlockDefinition,
    head: Definition,
    parameters: tuple[Parameters, Parameters, Parameters],
    token: jax.Array,
    position: jax.Array,
    cache: KVCache,
    steps: int,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Generate greedily for `steps` tokens, starting with `token` at `position`. Donates `cache`.

    Args:
        parameters: of the embeddings, the blocks and the head.
        token, position: int32 [B], the first token to append to each sequence, and its position.

    Returns:
        The appended tokens int32 [B, steps], which begin with `token`; the next token [B]; and the cache.
    """
    embed_parameters, blocks, head_parameters = parameters
    embedding, output = embed.bind(embed_parameters), head.bind(head_parameters)

    def append(carry: tuple[jax.Array, jax.Array, KVCache], _: None) -> tuple[Any, jax.Array]:
        token, position, cache = carry

        def step(hidden: jax.Array, layer: tuple[Parameters, KVCache]) -> tuple[jax.Array, KVCache]:
            cache = BlockKVCache(position, *layer[1])
            hidden = block.run(layer[0], hidden, cache=cache)
            return hidden, (cache.keys, cache.values)

        hidden, cache = lax.scan(step, embedding(token[:, None], position), (blocks, cache))
        following = jnp.argmax(output(hidden)[:, 0], axis=-1).astype(token.dtype)
        return (following, position + 1, cache), token

    (token, _, cache), tokens = lax.scan(append, (token, position, cache), None, length=steps)
    return constrain(tokens.T), constrain(token), cache


class ResidentModel:
    """A model whose parameters stay in device memory.

    Args:
        checkpoint, model: the model to load; its tensors are already checked.
        devices: devices to load it on.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model, devices: Devices):
        def put(names: dict[str, str]) -> Parameters:
            return {path: devices.put(value) for path, value in read_parameters(checkpoint, names).items()}

        self._devices = devices
        self._definitions = (model.embed(), model.block(), model.head())
        self._parameters = (put(model.names.embed), stacked_blocks(checkpoint, model, devices), put(model.names.head))

    def log_likelihoods(
        self, ids: np.ndarray, rows: np.ndarray, positions: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of token targets[n] as the one after position positions[n] of sequence rows[n].

        Args:
            ids: int32 [B, L] sequences; B is a multiple of the mesh's `data`.
            rows, positions, targets: int32 [N].

        Returns:
            Natural log-probabilities, float32 [N], and whether each token is the most likely one, bool [N].
        """
        embed, block, head = self._definitions
        embed_parameters, blocks, head_parameters = self._parameters
        count = len(rows)
        # Pad to a power of two, or to whole steps of the head, so that only a few shapes are compiled.
        steps = -(-count // HEAD_POSITIONS)
        size = 1 << max(4, (count - 1).bit_length()) if count < HEAD_POSITIONS else steps * HEAD_POSITIONS
        padded = [np.pad(np.asarray(values, np.int32), (0, size - count)) for values in (rows, positions, targets)]
        with self._devices.context():
            hidden = _hidden_states(embed, block, embed_parameters, blocks, self._devices.put(ids, DATA))
            log_probabilities, greedy = _log_likelihoods(head, head_parameters, hidden, *map(self._devices.put, padded))
        return np.asarray(log_probabilities)[:count], np.asarray(greedy)[:count]

    def generate(
        self, ids: np.ndarray, lengths: np.ndarray, tokens: int, steps: int, stop: Callable[[np.ndarray], bool]
    ) -> np.ndarray:
        """Continue prompts greedily.

        Args:
            ids: int32 [B, L] prompts, padded on the right.
            lengths: int32 [B], lengths of the prompts without padding.
            tokens: maximum number of tokens to generate, a multiple of `steps`.
            steps: tokens generated between two calls of `stop`.
            stop: called with the tokens generated so far, int32 [B, n]; generation ends when it returns True.

        Returns:
            Generated tokens int32 [B, n], n a multiple of `steps`.
        """
        put, generated = self._devices.put, []
        with self._devices.context():
            capacity = ids.shape[1] + tokens
            token, cache = _prefill(*self._definitions, self._parameters, put(ids, DATA), put(lengths, DATA), capacity)
            for begin in range(0, tokens, steps):
                position = put(np.asarray(lengths + begin, np.int32), DATA)
                more, token, cache = _decode(*self._definitions, self._parameters, token, position, cache, steps)
                generated.append(np.asarray(more))
                if stop(np.concatenate(generated, axis=1)):
                    break
        return np.concatenate(generated, axis=1)
