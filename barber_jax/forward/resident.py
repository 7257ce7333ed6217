"""A whole model in device memory: log-likelihoods of tokens and generation.

The blocks' parameters are stacked, [blocks, ...], and scanned over, so that only one block of each kind is compiled at
any depth.
On a mesh, sequences are sharded over `data` and the blocks' linears over `model`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters, read_stacked
from barber_jax.devices.mesh import Devices
from barber_jax.forward import generation
from barber_jax.forward.generation import KVCache, Network, RunBlock, Sampling
from barber_jax.forward.passes import HEAD_TOKENS, Parameters, head_tokens, not_finite
from barber_jax.models.decoder import BlockDefinition, BlockStack, Definition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, constrain, parameter_axes


def stacked_blocks(checkpoint: Checkpoint, model: Model, devices: Devices) -> Parameters:
    """Read the parameters of all blocks and stack them on the devices: path -> [blocks, ...]."""
    axes = parameter_axes(model.sub_blocks)
    # One path at a time, so that host memory never holds the whole model.
    return {
        path: devices.put(read_stacked(checkpoint, model, path), None, *axes.get(path, ()))
        for path in model.names.block
    }


@partial(jax.jit, static_argnames=("embed", "blocks"))
def _hidden_states(
    embed: Definition, blocks: BlockStack, embed_parameters: Parameters, stacked: Parameters, ids: jax.Array
) -> jax.Array:
    """Hidden states after the last block, [B, L, D], of token ids int32 [B, L]."""

    def step(block: BlockDefinition, hidden: jax.Array, layer: Parameters) -> tuple[jax.Array, None]:
        return constrain(block.run(layer, hidden), DATA), None

    return blocks.scan(step, constrain(embed.bind(embed_parameters)(ids), DATA), stacked)[0]


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
        rows, positions, targets: int32 [N]; N is a multiple of HEAD_TOKENS, or a power of two below it.

    Returns:
        float32 [N] and bool [N].
    """
    module = head.bind(head_parameters)

    def part(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = module(piece[0][None])[0].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, piece[1][:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == piece[1]

    step = min(head_tokens(head), len(rows))
    states = hidden[rows, positions].reshape(-1, step, hidden.shape[-1])
    log_probabilities, greedy = lax.map(part, (states, targets.reshape(-1, step)))
    return constrain(log_probabilities.reshape(-1)), constrain(greedy.reshape(-1))


def _network(
    embed: Definition, blocks: BlockStack, head: Definition, parameters: tuple[Parameters, Parameters, Parameters]
) -> Network:
    """The model for generation, with the parameters of the embeddings, of the stacked blocks and of the head."""

    def run_blocks(hidden: jax.Array, each: RunBlock, caches: KVCache | None) -> tuple[jax.Array, KVCache]:
        def step(
            block: BlockDefinition, hidden: jax.Array, layer: tuple[Parameters, KVCache | None]
        ) -> tuple[jax.Array, KVCache]:
            return each(partial(block.run, layer[0]), hidden, layer[1])

        return blocks.scan(step, hidden, (parameters[1], caches))

    return Network(embed.bind(parameters[0]), run_blocks, head.bind(parameters[2]))


@partial(jax.jit, static_argnames=("definitions", "capacity"))
def _prefill(definitions: tuple, parameters: tuple, *arguments, capacity: int) -> tuple[jax.Array, KVCache]:
    """`generation.prefill`."""
    return generation.prefill(_network(*definitions, parameters), *arguments, capacity)


@partial(jax.jit, static_argnames=("definitions", "steps"), donate_argnames="cache")
def _decode(
    definitions: tuple, parameters: tuple, *arguments, cache: KVCache, steps: int
) -> tuple[jax.Array, jax.Array, KVCache]:
    """`generation.decode`. Donates `cache`."""
    return generation.decode(_network(*definitions, parameters), *arguments, cache, steps)


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
        self._definitions = (model.embed(), model.blocks(), model.head())
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

        Raises:
            BarberError: logits are not finite.
        """
        embed, blocks, head = self._definitions
        embed_parameters, stacked, head_parameters = self._parameters
        count = len(rows)
        # Pad to a power of two, or to whole steps of the head, so that only a few shapes are compiled.
        steps = -(-count // HEAD_TOKENS)
        size = 1 << max(4, (count - 1).bit_length()) if count < HEAD_TOKENS else steps * HEAD_TOKENS
        padded = [np.pad(np.asarray(values, np.int32), (0, size - count)) for values in (rows, positions, targets)]
        with self._devices.context():
            hidden = _hidden_states(embed, blocks, embed_parameters, stacked, self._devices.put(ids, DATA))
            log_probabilities, greedy = _log_likelihoods(head, head_parameters, hidden, *map(self._devices.put, padded))
        found = np.asarray(log_probabilities)[:count]
        if not np.isfinite(found).all():
            raise not_finite()
        return found, np.asarray(greedy)[:count]

    def generate(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        tokens: int,
        steps: int,
        stop: Callable[[np.ndarray], bool],
        sampling: Sampling | None = None,
    ) -> np.ndarray:
        """Continue prompts.

        Args:
            ids: int32 [B, L] prompts, padded on the right; B is a multiple of the mesh's `data`.
            lengths: int32 [B], lengths of the prompts without padding.
            tokens: maximum number of tokens to generate.
            steps: tokens generated between two calls of `stop`.
            stop: called with the tokens generated so far, int32 [B, n]; generation ends when it returns True.
            sampling: how tokens are drawn; None for the most likely one each time.

        Returns:
            Generated tokens int32 [B, n], n a multiple of `steps`; those after the first `tokens` mean nothing.
        """
        model, put = (self._definitions, self._parameters), self._devices.put
        prompts = (put(ids, DATA), put(np.asarray(lengths, np.int32), DATA))
        if sampling is not None:
            sampling = sampling._replace(rows=put(np.asarray(sampling.rows, np.int32), DATA))
        with self._devices.context():
            return generation.run(
                partial(_prefill, *model), partial(_decode, *model), *prompts, tokens, steps, stop, sampling
            )
