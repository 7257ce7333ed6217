"""Calibration samples that the dense model writes itself, drawn token by token from its own distribution.

The whole model is in device memory meanwhile, with the keys and values of the sequences that are written at the same
time. A step is one dispatch for each block, and the caches are donated, so that they are written in place; nothing is
copied to the host in between. Axis letters are those of `generation`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.devices.mesh import Devices
from barber_jax.forward.dense import read_replicated
from barber_jax.forward.generation import Sampling, check_tokens, choose, extended
from barber_jax.forward.passes import Parameters
from barber_jax.models.attention import BlockKVCache
from barber_jax.models.decoder import BlockDefinition, BlockStack, Definition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, MODEL, constrain, model_axis_size

TEMPERATURE = 1.0
"""Tokens are drawn from the model's distribution as it is."""
MAX_BATCH = 64
"""Sequences written at the same time, at most, by each device along the mesh axis `data`."""
CACHE_BYTES = 4 << 30
"""Memory for keys and values, at most, of each device along the mesh axis `data`."""
MAX_TOKENS = 2**31
"""Tokens of all samples together stay below this."""
FIRST_CAPACITY = 128
"""Positions that the caches begin with; they double when they are full."""
REPORT_INTERVAL = 16
"""Steps that are dispatched before the host waits for them."""

Caches = list[tuple[jax.Array, jax.Array]]
"""Keys and values of each block."""


@dataclass(frozen=True)
class Boundary:
    """How a document begins and ends in the text that a model writes.

    Attributes:
        kind: what a sample begins with: the model's `begin` token; where it has none, its `end` token, which is then
            what lies between two documents; where it has neither, a `random` token, each as likely as any other.
        token: the token that a document begins with; None if that is random.
        ends: tokens after which the next document begins, with `token`.
    """

    kind: str
    token: int | None
    ends: tuple[int, ...]


def boundary_of(checkpoint: Checkpoint, vocabulary: int) -> Boundary:
    """The tokens at which documents begin and end, by config.json: `bos_token_id` and `eos_token_id`.

    Where config.json has neither, they are those of the tokenizer, if there is one.

    Raises:
        BarberError: an entry is no token of the model.
    """
    config = checkpoint.config
    begins, ends = (_tokens(config, key, vocabulary) for key in ("bos_token_id", "eos_token_id"))
    if not begins and not ends:
        begins, ends = _tokens_of_tokenizer(checkpoint, vocabulary)
    kind = "begin" if begins else "end" if ends else "random"
    token = next(iter((*begins, *ends)), None)
    # A token that ends a document and begins the next one too needs no other after it.
    return Boundary(kind, token, tuple(end for end in ends if begins and end != token))


def _tokens(config: dict, key: str, vocabulary: int) -> tuple[int, ...]:
    """A token id or a list of some, of config.json; none if the entry is missing or null."""
    given = config.get(key)
    listed = given if isinstance(given, list) else [] if given is None else [given]
    for token in listed:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise BarberError(
                f"config.json: {key} {given!r} is no token of the model's {vocabulary}, with which --calibration self "
                "begins a document; correct it, or set it to null"
            )
    return tuple(listed)


def _tokens_of_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    try:
        tokenizer = checkpoint.tokenizer()
    except BarberError:
        # Nothing is tokenized: a model without a tokenizer can write all the same.
        return (), ()
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tuple((token,) if token is not None and token < vocabulary else () for token in known)


@dataclass(frozen=True)
class Writer:
    """A model in device memory, as it is needed to write.

    Attributes:
        devices: the devices that hold it.
        definitions: of the embeddings, the blocks and the head.
        embed, head: their parameters.
        blocks: parameters of each block.
    """

    devices: Devices
    definitions: tuple[Definition, BlockStack, Definition]
    embed: Parameters
    blocks: list[Parameters]
    head: Parameters

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Model, devices: Devices) -> "Writer":
        """Read the whole model; the host holds one block at a time."""
        blocks = [
            devices.put_block(model.sub_blocks, read_parameters(checkpoint, model.names.of_block(index)))
            for index in range(model.layers)
        ]
        embed, head = (read_replicated(checkpoint, names, devices) for names in (model.names.embed, model.names.head))
        return cls(devices, (model.embed(), model.blocks(), model.head()), embed, blocks, head)


@partial(jax.jit, static_argnames=("boundary", "vocabulary"))
def _begin(boundary: Boundary, vocabulary: int, sampling: Sampling) -> jax.Array:
    """The first token of each sequence, int32 [B]."""
    rows = sampling.rows
    if boundary.token is None:
        return constrain(choose(jnp.zeros((len(rows), vocabulary)), jnp.zeros_like(rows), sampling), DATA)
    return constrain(jnp.full_like(rows, boundary.token), DATA)


@partial(jax.jit, static_argnames="definition")
def _embed(definition: Definition, parameters: Parameters, token: jax.Array, position: jax.Array) -> jax.Array:
    """Hidden state [B, 1, D] of a token [B] at a position [B]."""
    return constrain(definition.bind(parameters)(token[:, None], position), DATA)


@partial(jax.jit, static_argnames="definition", donate_argnames=("keys", "values"))
def _block(
    definition: BlockDefinition,
    parameters: Parameters,
    hidden: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden state [B, 1, D] after a block, and its cache with one more position. Donates the cache."""
    cache = BlockKVCache(position, keys, values)
    hidden = definition.run(parameters, hidden, cache=cache)
    return constrain(hidden, DATA), *_sharded(cache.keys, cache.values)


@partial(jax.jit, static_argnames=("definition", "boundary"))
def _next(
    definition: Definition,
    boundary: Boundary,
    parameters: Parameters,
    hidden: jax.Array,
    token: jax.Array,
    position: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """The token after a token [B] at a position [B], given its hidden state after the last block; and its position."""
    following = choose(definition.bind(parameters)(hidden)[:, 0], position + 1, sampling)
    if boundary.ends:
        ended = jnp.isin(token, jnp.asarray(boundary.ends))
        following = jnp.where(ended, boundary.token, following)
    return constrain(following, DATA), constrain(position + 1, DATA)


@partial(jax.jit, static_argnames="more")
def _extend(keys: jax.Array, values: jax.Array, more: int) -> tuple[jax.Array, jax.Array]:
    return _sharded(*extended(keys, values, more))


def _sharded(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values: sequences are sharded over `data`, key-value heads over `model` where that divides them."""
    heads = MODEL if keys.shape[1] % model_axis_size() == 0 else None
    return constrain(keys, DATA, heads), constrain(values, DATA, heads)


def write_samples(
    checkpoint: Checkpoint,
    model: Model,
    devices: Devices,
    *,
    samples: int,
    length: int,
    seed: int,
    boundary: Boundary,
    progress: Progress,
) -> np.ndarray:
    """Let a model write samples: int32 [samples, length] token ids, each drawn at temperature 1 given those before it.

    A sample begins as `boundary` says. After an end token it goes on with the token that begins a document, as packed
    text does, so that all have the same length. Sample n depends on the seed and on n: the draws are the same for any
    number of samples and devices, and so are the ids but for the rounding of the logits.

    Args:
        checkpoint, model: the model that writes; its tensors are already checked.
        devices: to compute on.
        boundary: from `boundary_of`.
        progress: shows tokens per second and the time left.

    Raises:
        BarberError: the samples are longer than the model's positions, or more tokens than could ever be written; or
            the model's logits are not finite.
    """
    model.check_length(length)
    if samples * length >= MAX_TOKENS:
        raise BarberError(
            f"{samples} samples of {length} tokens: a model writes fewer than 2**31 tokens; lower --samples or --tokens"
        )
    writer, data = Writer.of(checkpoint, model, devices), devices.shape[0]
    with devices.context(), _quiet_devices():
        state = _cache_shapes(writer, model)
        batch = batch_size(samples, length, data, sum(each.dtype.itemsize * each.size for each in state) * model.layers)
        batches = -(-samples // batch)
        with progress.steps("writing calibration text", batches * length) as shown:
            start, written = time.perf_counter(), []
            for index in range(batches):
                # The last batch is filled up, so that all are computed by the same programs.
                rows = np.arange(index * batch, (index + 1) * batch)
                sampling = Sampling.of(TEMPERATURE, seed % 2**32, rows)
                sampling = sampling._replace(rows=devices.put(sampling.rows, DATA))

                def report(done: int, first: int = index * length) -> None:
                    speed = batch * (first + done) / (time.perf_counter() - start)
                    shown.step(first + done, tokens_per_second=speed)
                    interrupt.check()

                written.append(devices.fetch(_write(writer, model, sampling, boundary, state, length, report)))
                check_tokens(written[-1])
    return np.concatenate(written)[:samples].astype(np.int32)


@contextlib.contextmanager
def _quiet_devices() -> Iterator[None]:
    """Wait for the devices when the body is interrupted: a process that ends while they compute may crash."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            jax.block_until_ready(jax.live_arrays())
        raise


def batch_size(samples: int, length: int, data: int, bytes_per_token: int) -> int:
    """Sequences to write at the same time: as many as fit `CACHE_BYTES`, a multiple of the mesh's `data`."""
    most = data * max(1, min(MAX_BATCH, CACHE_BYTES // (bytes_per_token * length)))
    # As even as possible, so that little is computed in vain.
    even = -(-samples // -(-samples // most))
    return -(-even // data) * data


def _cache_shapes(writer: Writer, model: Model) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a block's keys and values of one token."""
    definition = writer.definitions[1][0]

    def one(parameters: Parameters, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = BlockKVCache()
        definition.run(parameters, hidden, cache=cache)
        return cache.keys, cache.values

    hidden = jax.eval_shape(lambda parameters: _embed_one(writer, parameters), writer.embed)
    return jax.eval_shape(one, writer.blocks[0], hidden)


def _embed_one(writer: Writer, parameters: Parameters) -> jax.Array:
    return writer.definitions[0].bind(parameters)(jnp.zeros((1, 1), jnp.int32))


def _write(
    writer: Writer,
    model: Model,
    sampling: Sampling,
    boundary: Boundary,
    state: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    length: int,
    report: Callable[[int], None],
) -> jax.Array:
    """Write one batch of sequences, int32 [B, length]."""
    embed, blocks, head = writer.definitions
    batch, capacity = len(sampling.rows), min(FIRST_CAPACITY, length)
    caches = [_empty(batch, capacity, state) for _ in writer.blocks]
    token = _begin(boundary, model.vocabulary, sampling)
    position, tokens = writer.devices.put(np.zeros(batch, np.int32), DATA), [token]
    for done in range(1, length):
        if done > capacity:
            more = min(capacity, length - capacity)
            caches, capacity = _extended(caches, more), capacity + more
        hidden = _embed(embed, writer.embed, token, position)
        for index, parameters in enumerate(writer.blocks):
            hidden, *cache = _block(blocks[index], parameters, hidden, position, *caches[index])
            caches[index] = tuple(cache)
        token, position = _next(head, boundary, writer.head, hidden, token, position, sampling)
        tokens.append(token)
        if done % REPORT_INTERVAL == 0:
            jax.block_until_ready(token)
            report(done)
    written = jnp.stack(tokens, axis=1).block_until_ready()
    report(length)
    return written


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(
    batch: int, capacity: int, state: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a block, with room for `capacity` positions."""
    keys, values = state
    _, heads, size, _ = keys.shape
    return _sharded(
        jnp.zeros((batch, heads, size, capacity), keys.dtype), jnp.zeros((batch, heads, capacity, size), values.dtype)
    )


def _extended(caches: Caches, more: int) -> Caches:
    """Caches with room for more positions; at any time only one block's is there twice."""
    larger = []
    while caches:
        larger.append(jax.block_until_ready(_extend(*caches.pop(0), more)))
    return larger
